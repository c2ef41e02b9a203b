"""Claims of the latency rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.report import latency
from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import RunInputs
from tests.unit.conformance.report.synthetic import IDENTITY, SLOW, CaseText, Night, write_junit

TEST = "tests.perf.test_latency"
ID = f"latency/{SLOW}"


def claims(folder: Path) -> dict[str, Claim]:
    return {claim.id: claim for claim in latency.claims(RunInputs.of(folder))}


def of_tests(tmp_path: Path, *cases: CaseText) -> Claim:
    write_junit(tmp_path / "perf.xml", cases, Night(0).provenance)
    return claims(tmp_path)[ID]


def test_all_76_rows_are_claimed_and_none_was_run(tmp_path: Path) -> None:
    found = claims(tmp_path)
    assert len(found) == len(documented.read()) == 76
    assert {claim.status for claim in found.values()} == {Status.NOT_RUN}
    assert found[ID].reference == "documented 24 ms, limit 26.9 ms"
    assert found[ID].label == "qkv融合"


@pytest.mark.parametrize(
    ("case", "status"),
    [
        (CaseText(TEST, f"test_latency[{SLOW}]", skip="not comparable: needs an Atlas 800I A2"), Status.NOT_COMPARABLE),
        (CaseText(TEST, f"test_latency[{SLOW}]", skip="needs 8 cards of this kind"), Status.NOT_RUN),
        (CaseText(TEST, f"test_latency[{SLOW}]", failure="row x was not run: not comparable: …"), Status.FAIL),
        (CaseText(TEST, f"test_latency[{SLOW}]"), Status.NOT_RUN),  # passed, and no figures say so
    ],
)
def test_what_a_test_alone_says(case: CaseText, status: Status, tmp_path: Path) -> None:
    assert of_tests(tmp_path, case).status is status


def test_measured_rows(tmp_path: Path) -> None:
    found = claims(Night(0, slower={SLOW: 1.2}).write(tmp_path))
    bad, good = found[ID], found["latency/7b-ladder-b4-graph-fused_qkv-prefill"]
    assert (bad.status, bad.where) == (Status.FAIL, Where.NPU)
    assert bad.message.startswith("slower: mean ")
    assert good.status is Status.PASS
    assert good.subject == "random weights, 1024 tokens + 1023 steps"
    assert good.reference.startswith("mean against 345 ms documented on Atlas 800I A2")
    assert found["latency/72b-ladder-b4-graph-fused_qkv-decode"].status is Status.NOT_RUN


def with_extra(tmp_path: Path, **changes: Any) -> Claim:
    Night(0).write(tmp_path)
    content = Night(0).benchmarks()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["row"] == SLOW:
            entry["extra_info"] |= changes
    (tmp_path / "benchmark.json").write_text(json.dumps(content), encoding="utf-8")
    return claims(tmp_path)[ID]


def test_held_against_nothing_is_no_pass(tmp_path: Path) -> None:
    claim = with_extra(tmp_path, compared=[], notes=["shown as stock-5.x"])
    assert (claim.status, claim.message) == (Status.NOT_COMPARABLE, "shown as stock-5.x")


STOCK = "7b-ladder-b4-eager-original-prefill"


def of_another_stock(tmp_path: Path, **changes: Any) -> Claim:
    Night(0, identity={**IDENTITY, "transformers": "5.24.0"}, **changes).write(tmp_path)
    return claims(tmp_path)[f"latency/{STOCK}"]


def test_the_stock_model_of_5_x_is_compared_with_nothing(tmp_path: Path) -> None:
    """Even where what wrote the file did compare it."""
    claim = of_another_stock(tmp_path)
    assert claim.status is Status.NOT_COMPARABLE
    assert (claim.step, claim.label) == ("stock-5.x", "")
    assert claim.title == "7B, batch 4, eager, stock-5.x: prefill"
    assert claim.subject.endswith(", stock-5.x")  # the history keeps it apart from 4.37's
    assert claim.reference == (
        "compared with nothing documented: the documented 575 ms are of the model of transformers 4.37.0, and 5.24.0 "
        "is installed"
    )
    assert claim.value is not None
    assert not latency.is_held(claim)
    ours = claims(tmp_path)[ID]
    assert (ours.status, ours.step, latency.is_held(ours)) == (Status.PASS, "fused_qkv", True)


def test_the_stock_model_of_4_37_is_compared(tmp_path: Path) -> None:
    claim = claims(Night(0).write(tmp_path))[f"latency/{STOCK}"]
    assert (claim.status, claim.step, claim.label, latency.is_held(claim)) == (
        Status.PASS,
        "original",
        "原始脚本",
        True,
    )


def test_fewer_decode_steps_are_compared_with_nothing(tmp_path: Path) -> None:
    claim = with_extra(tmp_path, decode_steps=20)
    assert (claim.status, claim.step) == (Status.NOT_COMPARABLE, "fused_qkv")
    assert claim.reference.endswith("documented for 1023 decode steps, measured in 20")


def test_what_was_recorded_on_the_machine_still_judges_it(tmp_path: Path) -> None:
    recorded = {"against": "recorded in 5 runs for 'x'", "statistic": "mean", "baseline_ms": 24.0, "high": 25.0}
    claim = with_extra(tmp_path, decode_steps=20, compared=[recorded])
    assert claim.status is Status.PASS
    assert claim.reference.startswith(
        "mean against 24 ms recorded in 5 runs for 'x', limit 25 ms; compared with nothing"
    )
    assert not latency.is_held(claim)


def test_injected_latencies_are_no_measurement(tmp_path: Path) -> None:
    assert with_extra(tmp_path, self_test=True).status is Status.NOT_RUN


def test_a_failed_test_fails_whatever_its_figures_are(tmp_path: Path) -> None:
    with_extra(tmp_path)
    failed = CaseText(TEST, f"test_latency[{SLOW}]", failure="fixture broke")
    write_junit(tmp_path / "perf.xml", [failed], Night(0).provenance)
    claim = claims(tmp_path)[ID]
    assert (claim.status, claim.message) == (Status.FAIL, "fixture broke")


def test_a_user_s_own_row_is_shown(tmp_path: Path) -> None:
    content = Night(0).benchmarks()
    content["benchmarks"] = content["benchmarks"][:1]
    content["benchmarks"][0]["extra_info"]["row"] = "0.5b-user-b1-graph-swiglu-decode"
    (tmp_path / "benchmark.json").write_text(json.dumps(content), encoding="utf-8")
    assert claims(tmp_path)["latency/0.5b-user-b1-graph-swiglu-decode"].status is Status.PASS


def test_an_emulated_row_is_not_a_real_one(tmp_path: Path) -> None:
    Night(0, identity={**IDENTITY, "verified": "emulated (torch_npu)"}).write(tmp_path)
    assert claims(tmp_path)[ID].where is Where.EMULATED
