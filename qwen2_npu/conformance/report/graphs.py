"""Claims of the graph suite: every documented graph is what its committed census says."""

from __future__ import annotations

import re

from qwen2_npu.conformance.report import census, junit
from qwen2_npu.conformance.report.census import Graph
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.inputs import Inputs
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.conformance.report.suites import Tally

AREA = "Graphs"

LADDER_BATCH = 4
"""Of the ladder's tables; graphs of other batches belong to a sweep."""

LOWERS = {"test_census_is_the_baseline", "test_cost_is_the_baseline"}
"""Tests that lower the graph and hold it against its census. Without one of them nothing says what it is now."""


def claims(inputs: Inputs) -> list[Claim]:
    """What the run's tests say of every documented graph."""
    cases = inputs.cases()
    by_graph: dict[str, list[tuple[junit.Case, str]]] = {}
    for case, text in cases:
        by_graph.setdefault(case.parameters, []).append((case, text))
    return [_claim(graph, by_graph.get(str(graph), [])) for graph in census.graphs()]


def _claim(graph: Graph, cases: list[tuple[junit.Case, str]]) -> Claim:
    claim = Claim(
        id=f"graphs/{graph}",
        area=AREA,
        title=f"{graph.size}, batch {graph.batch}, {graph.phase}, {graph.step}: as its census",
        step=graph.step,
        label=labels().get(graph.step, ""),
        place=_place(graph),
    )
    tally = Tally.of(cases)
    lowered = [case for case, _ in cases if case.function in LOWERS and case.outcome != "skipped"]
    if not lowered and tally.status is not Status.FAIL:
        return claim
    said = tally.say(claim)
    if said.status is Status.FAIL:
        return said.found(Status.FAIL, reference=changes(said.message) or said.reference)
    return said.found(said.status, value=Value(graph.launches, "kernels"))


def _place(graph: Graph) -> Place:
    if graph.batch != LADDER_BATCH:
        return Place("batch", str(graph.batch), AREA, graph.size)
    return Place("ladder", graph.step, AREA, graph.size)


_LINE = re.compile(r'(?:E\s+)?(?P<sign>[-+])?\s*"(?P<key>\w+)": (?:(?P<opens>\{)|(?P<number>\d+),?)')
"""Of a census diff, as pytest writes it into a failure."""


def changes(message: str) -> str:
    """A census diff in one line, ``Cast launches 0 → 1``; empty where the message holds none.

    Of launches alone where they differ: they are what a reader must know first.
    """
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    operator = ""
    for line in message.splitlines():
        found = _LINE.fullmatch(line.strip())
        if found is None:
            operator = "" if line.strip().lstrip("E ").startswith("@@") else operator
        elif found["opens"]:
            operator = "" if found["key"] in ("layer", "outside", "costs", "views") else found["key"]
        elif found["sign"]:
            side = before if found["sign"] == "-" else after
            side[f"{operator} {found['key']}".strip()] = found["number"]
    pairs = {name: (before.get(name, "0"), after.get(name, "0")) for name in {**before, **after}}
    changed = [name for name, (old, new) in pairs.items() if old != new]
    launches = [name for name in changed if name.endswith("launches")]
    return ", ".join(f"{name} {pairs[name][0]} → {pairs[name][1]}" for name in launches or changed)
