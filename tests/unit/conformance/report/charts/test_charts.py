"""Each chart shows what it is given, and survives being given nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from qwen2_npu.conformance.accuracy import noise
from qwen2_npu.conformance.graph import committed
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.report.charts import accuracy, kernels, roofline
from qwen2_npu.conformance.report.charts.ladder import LadderMark, ladder
from qwen2_npu.conformance.report.charts.sweep import sweep
from qwen2_npu.conformance.report.charts.trend import trend

CARD = HARDWARE[DOCUMENTED_SOC]


def test_ladder_shows_all_three() -> None:
    points = {
        ("swiglu", "graph"): LadderMark(24.0, 27.0, (25.5, 26.5), bad=True),
        ("swiglu", "eager"): LadderMark(33.0),
    }
    svg = ladder(["swiglu"], points, "decode, ms", 400)
    assert "27 / 24" in svg
    assert ">33<" in svg
    for name in ("documented", "documented-2", "predicted", "bad"):
        assert f"var(--{name})" in svg
    assert "var(--measured)" not in svg
    assert "27 / 24" not in ladder(["swiglu"], {}, "decode, ms", 400)


def test_sweep() -> None:
    svg = sweep({1: LadderMark(23.0, 22.8), 48: LadderMark(45.0, None, (33.0, 35.0))}, "7B decode, ms")
    assert ">48<" in svg
    assert "7B decode, ms" in svg
    assert "var(--predicted)" in svg


@pytest.mark.parametrize("draw", [
    lambda ends: ladder(["swiglu"], {("swiglu", "graph"): LadderMark(40.0, None, ends)}, "decode, ms", 400),
    lambda ends: sweep({1: LadderMark(40.0, None, ends)}, "7B decode, ms"),
], ids=["ladder", "sweep"])  # fmt: skip
def test_a_prediction_is_drawn_from_end_to_end(draw: Callable[[tuple[float, float]], str]) -> None:
    first, low, high = (draw(ends) for ends in ((20.0, 30.0), (25.0, 30.0), (20.0, 35.0)))
    assert len({first, low, high}) == 3, "one of the ends is not shown"


def test_the_axis_has_room_for_the_most_that_is_predicted() -> None:
    assert LadderMark(1.0, None, (2.0, 3.0)).largest == 3.0


def test_roofline_shares() -> None:
    memory_bound = roofline.RooflinePoint("x-decode", flops=10**9, nbytes=8 * 10**9, ms=20.0, source="documented")
    assert memory_bound.share(CARD) == pytest.approx(8e9 / CARD.memory_bandwidth.value / 0.02)
    compute_bound = roofline.RooflinePoint("x-prefill", flops=28 * 10**12, nbytes=10**9, ms=200.0, source="measured")
    assert compute_bound.share(CARD) == pytest.approx(0.5)
    svg = roofline.roofline([memory_bound, compute_bound], CARD)
    assert "0.8 TB/s" in svg
    assert "280 TFLOP/s" in svg


def test_the_limit_is_the_comparison_s_own() -> None:
    assert accuracy.LIMIT == noise.RMS_FACTOR


def test_accuracy_errors() -> None:
    found = {"a": accuracy.AccuracyBar(1.1, 2, 0, 241), "b": accuracy.AccuracyBar(math.nan, 0, 7, 241)}
    errors = accuracy.errors(["a", "b", "c"], found, 400)
    assert ">1.10<" in errors
    assert ">nan<" in errors
    assert "var(--bad)" in errors
    mismatches = accuracy.mismatches(["a", "b", "c"], found, 400)
    assert "2 of 241" in mismatches
    assert "0 of 241, 7 beyond" in mismatches


def test_every_kernel_has_a_kind() -> None:
    operators = {name for graph in committed.graphs() for name in graph.layer}
    rest = {name for name in operators if kernels.kind_of(name) == kernels.REST}
    assert rest <= {"Add", "Mul", "Muls", "Neg", "GatherV2", "Adds", "Sub", "RealDiv", "Maximum", "Minimum"} | {
        "MoeGatingTopKSoftmax", "MoeFinalizeRoutingV2",
    }  # fmt: skip
    svg = kernels.kernels(["a"], {"a": {"MatMul": 5, "Cast": 2}}, "decode", 400)
    assert ">7<" in svg


def test_trend() -> None:
    assert "var(--bad)" in trend([(1.0, True), (2.0, False)], "t")
    assert "var(--bad)" not in trend([(1.0, True), (1.0, True)], "t")
