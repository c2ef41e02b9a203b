"""Claims of the latency suite: every documented row, and every row of a model the user named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.documented import Documented
from qwen2_npu.conformance.perf.gate import limit_ms
from qwen2_npu.conformance.perf.rows import Row
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.inputs import RunInputs, finite
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.conformance.report.suites import LATENCY

AREA = "Latency"

SELF_TEST = "a self-test: its latencies were injected, not measured"
NOT_COMPARABLE = "not comparable"
"""How the gate's reason begins where nothing measured here can be compared with the tables."""

NOT_HELD = "compared with nothing documented"
"""How a claim says that its value may not stand beside its row's documented number."""


def claims(inputs: RunInputs) -> list[Claim]:
    """Every documented row and whatever else was measured."""
    known = {f"latency/{number.row.id}": _expected(number) for number in documented.read()}
    for id, facts in _from_tests(inputs):
        known[id] = known.get(id, _unknown(id)).found(**facts)
    for id, facts in _from_benchmarks(inputs):
        claim = known.get(id, _unknown(id))
        if claim.status is Status.FAIL and facts["status"] is not Status.FAIL:
            facts |= {"status": Status.FAIL, "message": claim.message}  # whatever its figures are, its test failed
        known[id] = claim.found(**facts)
    return list(known.values())


def _unknown(id: str) -> Claim:
    """A row that no table has."""
    return Claim(id, AREA, id.partition("/")[2])


def _expected(number: Documented) -> Claim:
    row = number.row
    return Claim(
        id=f"latency/{row.id}",
        area=AREA,
        title=title(row),
        step=row.configuration.step,
        label=labels().get(row.configuration.step, ""),
        reference=f"documented {number.ms:.0f} ms, limit {limit_ms(number):.4g} ms",
        place=_place(row),
    )


def title(row: Row) -> str:
    """The row in words."""
    return f"{row.configuration}: {row.phase}"


def _place(row: Row) -> Place:
    what = row.configuration
    group, column = f"{what.model_on_cards}, ms", f"{what.mode} {row.phase}"
    if row.table.endswith("-batch"):
        return Place("batch", str(what.batch), group, column)
    return Place("ladder", what.step, group, column)


def _from_tests(inputs: RunInputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """From JUnit: what was not measured, and why. What was measured says more in the benchmark file."""
    for case, verified in inputs.cases():
        if case.module != LATENCY or not case.parameters:
            continue
        message = case.message
        if case.outcome == "passed":
            # A pass whose figures are missing is not shown as one.
            facts = {"status": Status.NOT_RUN, "message": "its test passed, but no benchmark file holds its numbers"}
        elif case.outcome == "failed":
            facts = {"status": Status.FAIL, "message": message}
        elif message.startswith(NOT_COMPARABLE):
            facts = {"status": Status.NOT_COMPARABLE, "message": message}
        else:
            facts = {"status": Status.NOT_RUN, "message": message}
        yield f"latency/{case.parameters}", {**facts, "verified": verified}


def _from_benchmarks(inputs: RunInputs) -> Iterator[tuple[str, dict[str, Any]]]:
    for content in inputs.benchmarks.values():
        made_by = Provenance.of_benchmark(content)
        transformers = str(made_by.identity.get("transformers") or "an unknown version")
        for benchmark in content["benchmarks"]:
            info = benchmark.get("extra_info") or {}
            if "row" in info and "mean_ms" in info:
                yield f"latency/{info['row']}", {**_facts(info, transformers), "verified": made_by.verified}


def is_held(claim: Claim) -> bool:
    """Whether the claim's value may stand beside its row's documented number."""
    return NOT_HELD not in claim.reference


def _facts(info: dict[str, Any], transformers: str) -> dict[str, Any]:
    if info.get("self_test"):
        return {"status": Status.NOT_RUN, "message": SELF_TEST}
    number = documented.by_id().get(info["row"])
    reason = ""
    if number is not None:
        reason = documented.why_not_row(number, info["input_tokens"], info["decode_steps"], transformers)
    compared = [
        entry for entry in info.get("compared") or [] if not (reason and entry["against"].startswith("documented"))
    ]
    against = "; ".join(
        f"{entry['statistic']} against {entry['baseline_ms']:.4g} ms {entry['against']}, limit {entry['high']:.4g} ms"
        for entry in compared
    )
    # A row that was compared with nothing has not passed.
    status = Status.FAIL if not info["passed"] else Status.PASS if compared else Status.NOT_COMPARABLE
    facts: dict[str, Any] = {
        "status": status,
        "subject": f"{info['weights']} weights, {info['input_tokens']} tokens + {info['decode_steps']} steps",
        "value": Value(finite(info["mean_ms"]), "ms"),
        "message": "\n".join([*info["failures"], *info["notes"]]),
    }
    if number is None or not reason:
        return facts | ({"reference": against} if against else {})
    reasoned = f"{NOT_HELD}: {reason}"
    facts["reference"] = f"{against}; {reasoned}" if against else reasoned
    if documented.other_stock(number, transformers):
        name = documented.stock_name(transformers)
        what = replace(number.row.configuration, step=name)
        facts |= {"step": name, "label": "", "title": title(replace(number.row, configuration=what))}
        facts["subject"] += f", {name}"
    return facts
