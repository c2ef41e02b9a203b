"""Claims of the graph suite: every documented graph is what its committed census says."""

from __future__ import annotations

import re

from qwen2_npu.conformance.graph import committed
from qwen2_npu.conformance.graph.committed import CommittedGraph
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report import junit
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.conformance.report.suites import Tally

AREA = "Graphs"

LADDER_BATCH = 4
"""Of the ladder's tables; graphs of other batches belong to a sweep."""

LOWERS = {"test_census_is_the_baseline", "test_cost_is_the_baseline"}
"""Tests that lower the graph and compare it with its census. Without one of them the graph has no result."""


def claims(inputs: RunInputs) -> list[Claim]:
    """What the run's tests say of every documented graph."""
    cases = inputs.cases()
    by_graph: dict[str, list[tuple[junit.JUnitCase, Verified]]] = {}
    for case, verified in cases:
        by_graph.setdefault(case.parameters, []).append((case, verified))
    return [_claim(graph, by_graph.get(str(graph), [])) for graph in committed.graphs()]


def _claim(graph: CommittedGraph, cases: list[tuple[junit.JUnitCase, Verified]]) -> Claim:
    claim = Claim(
        id=f"graphs/{graph}",
        area=AREA,
        title=f"{graph.size}, batch {graph.batch}, {graph.phase}, {graph.step}: the same kernels as in its census",
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


def _place(graph: CommittedGraph) -> Place:
    if graph.batch != LADDER_BATCH:
        return Place("batch", str(graph.batch), AREA, graph.size)
    return Place("ladder", graph.step, AREA, graph.size)


_LINE = re.compile(r'(?:E\s+)?(?P<sign>[-+])?\s*"(?P<key>\w+)": (?:(?P<opens>\{)|(?P<number>-?\d+),?)')
"""Of a census diff, as pytest writes it into a failure."""


def changes(message: str) -> str:
    """A census diff in one line, ``Cast launches 0 → 1``; empty where the message holds none.

    Of launches alone where they differ: they are what a reader must know first.
    """
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for hunk in _hunks(message):
        before |= _side(hunk, unwanted="+")
        after |= _side(hunk, unwanted="-")
    names = {**before, **after}
    changed = [name for name in names if before.get(name, 0) != after.get(name, 0)]
    launches = [name for name in changed if name.endswith("launches")]
    return ", ".join(f"{name} {before.get(name, 0)} → {after.get(name, 0)}" for name in launches or changed)


def _hunks(message: str) -> list[list[re.Match[str]]]:
    """The lines that hold names and numbers, hunk by hunk."""
    hunks: list[list[re.Match[str]]] = []
    for line in message.splitlines():
        found = _LINE.fullmatch(line.strip())
        if line.strip().lstrip("E ").startswith("@@"):
            hunks.append([])
        elif found is not None and hunks:
            hunks[-1].append(found)
    return hunks


def _side(hunk: list[re.Match[str]], unwanted: str) -> dict[str, int]:
    """One side of a hunk, whole: a diff may begin in the middle of one operator and end in that of the next."""
    numbers, operator = {}, ""
    for line in hunk:
        if line["sign"] == unwanted:
            continue
        if line["opens"]:
            operator = "" if line["key"] in ("layer", "outside", "costs", "views") else line["key"]
        else:
            numbers[f"{operator} {line['key']}".strip()] = int(line["number"])
    return numbers
