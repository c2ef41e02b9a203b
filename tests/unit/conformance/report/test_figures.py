"""What the charts are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.report import figures
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.results import Results
from qwen2_npu.optimizations import LADDER, ORIGINAL
from tests.unit.conformance.report.synthetic import IDENTITY, SLOW, WRONG_STEP, Night


def numbers(night) -> figures.Numbers:  # type: ignore[no-untyped-def]
    return figures.Numbers.of(night.results.claims, night.results.inputs.predictions)


def test_a_point_holds_documented_measured_and_predicted(night) -> None:  # type: ignore[no-untyped-def]
    found = numbers(night)
    slow = found.point(documented.by_id()[SLOW])
    assert (slow.documented, slow.bad) == (24.0, True)
    assert slow.measured is not None
    assert 27 < slow.measured < 27.6
    assert slow.predicted is not None
    assert slow.predicted == pytest.approx((25.2, 26.4))
    unmeasured = found.point(documented.by_id()["72b-ladder-b4-graph-fused_qkv-decode"])
    assert (unmeasured.measured, unmeasured.bad) == (None, False)


def test_ladders_carry_the_guide_s_names(night) -> None:  # type: ignore[no-untyped-def]
    small, large = figures.ladders(numbers(night))
    assert small.labels[-1] == ("fused_qkv", "qkv融合")
    assert large.labels[-1] == ("ifa_tiling", "IFA算子计算优化+tiling全下沉")
    assert len(small.svgs) == 2


def test_shares_of_the_roof(night) -> None:  # type: ignore[no-untyped-def]
    roof = figures.rooflines(numbers(night))
    shares = dict(roof.rows)["7B, batch 1, fused_qkv"]["decode"]
    assert (shares.documented, shares.roof) == ("78%", "memory")
    assert shares.measured != ""
    assert dict(roof.rows)["72B, batch 4, fused_qkv"]["decode"].measured == ""


def test_the_census_shows_what_each_step_changes() -> None:
    census = figures.censuses()
    assert [row[0] for row in census.rows][: len(LADDER) + 1] == [ORIGINAL, *LADDER]
    counts = {row[0]: dict(zip(census.operators, row[2], strict=True)) for row in census.rows}
    assert counts["swiglu"]["SwiGlu"] == ("1", "more")
    assert counts["swiglu"]["Swish"] == ("", "less")
    assert counts["kv_scatter"]["ScatterPaKvCache"] == ("1", "more")
    assert counts["kv_scatter"]["Scatter"] == counts["kv_scatter"]["BatchMatMul"] == ("", "less")


def test_unexcused_mismatches_are_counted() -> None:
    night = Night(0, wrong_steps=frozenset({WRONG_STEP}))
    row = next(row for row in night.verification()["rows"] if row["step"] == WRONG_STEP)
    step = figures._step(row)
    assert (step.unexcused, step.excused) == (19, 5)
    inputs = RunInputs.__new__(RunInputs)
    inputs.verifications = {}
    assert figures.accuracies(inputs) == []


def of_5_x(tmp_path: Path, **changes: Any) -> figures.Numbers:
    night = Night(0, identity={**IDENTITY, "transformers": "5.24.0"}, **changes)
    results = Results.of(night.write(tmp_path))
    return figures.Numbers.of(results.claims, {})


def test_the_stock_model_of_5_x_stands_in_a_row_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = of_5_x(tmp_path)
    original = documented.by_id()["7b-ladder-b4-eager-original-prefill"]
    assert numbers.point(original).documented == 575
    assert numbers.point(original).measured is None
    drawn = []
    monkeypatch.setattr(figures, "ladder", lambda steps, points, *rest: drawn.append((steps, points)) or "")
    small, large = figures.ladders(numbers)
    steps, points = drawn[0]
    assert steps[:3] == ["original", "stock-5.x", "fixed_kv_cache"]
    own = points["stock-5.x", "eager"]
    assert own.documented is None
    assert 560 < own.measured < 570
    assert small.labels[1] == ("stock-5.x", "")
    assert len(large.labels) == 7  # nothing of the 72B was measured


def test_the_stock_model_of_4_37_stands_on_its_bar(tmp_path: Path) -> None:
    numbers = figures.Numbers.of(Results.of(Night(0).write(tmp_path)).claims, {})
    point = numbers.point(documented.by_id()["7b-ladder-b4-eager-original-prefill"])
    assert point.measured is not None
    assert [step for step, _ in figures.ladders(numbers)[0].labels][:2] == ["original", "fixed_kv_cache"]


def test_the_roofline_has_no_share_of_another_stock(tmp_path: Path) -> None:
    shares = dict(figures.rooflines(of_5_x(tmp_path)).rows)
    assert {share.measured for share in shares["7B, batch 4, original"].values()} == {""}
    assert "" not in {share.measured for share in shares["7B, batch 4, fused_qkv"].values()}
