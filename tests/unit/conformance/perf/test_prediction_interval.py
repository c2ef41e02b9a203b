"""The prediction interval: quantiles against published tables, coverage by simulation, and what is refused."""

from __future__ import annotations

import math
import random
import statistics
import sys

import pytest

from qwen2_npu.conformance.perf.prediction_interval import NARROWEST, WIDEST, Interval, prediction_interval


@pytest.mark.parametrize(("runs", "published"), [(5, 4.604), (6, 4.032), (10, 3.250), (31, 2.750)])
def test_the_width_is_of_the_published_quantiles(runs: int, published: float) -> None:
    """t(0.995, runs - 1) of the tables: runs that alternate between two values have a known deviation."""
    figures = [20 * math.exp(0.02 * (-1) ** run) for run in range(runs)]
    deviation = statistics.stdev(math.log(figure) for figure in figures)
    half = published * deviation * math.sqrt(1 + 1 / runs)
    assert math.log(prediction_interval(figures).factor) == pytest.approx(half, rel=2e-4)


def test_the_next_run_lies_within_as_often_as_promised() -> None:
    generator = random.Random(0)
    trials, outside = 1500, 0
    for _ in range(trials):
        *runs, following = (25 * math.exp(generator.gauss(0, 0.01)) for _ in range(6))
        interval = prediction_interval(runs)
        outside += not interval.low <= following <= interval.high
    assert outside / trials <= 0.018  # 1 % promised; 0.018 is three standard errors above


def test_more_runs_narrow_it_and_it_scales() -> None:
    generator = random.Random(1)
    runs = [25 * math.exp(generator.gauss(0, 0.01)) for _ in range(20)]
    assert prediction_interval(runs).factor < prediction_interval(runs[:5]).factor
    seconds = prediction_interval([run * 1000 for run in runs])
    assert seconds.factor == pytest.approx(prediction_interval(runs).factor)
    assert seconds.centre == pytest.approx(1000 * prediction_interval(runs).centre)


def test_it_is_never_narrower_than_a_percent_and_a_wide_one_is_no_gate() -> None:
    assert prediction_interval([20.0, 20.0001, 20.0, 20.0, 20.0]).factor == 1 + NARROWEST
    calm, noisy = [20, 20.1, 19.9, 20.05, 19.95], [20, 22, 18, 21, 19]
    assert prediction_interval(calm).useful
    assert not prediction_interval(noisy).useful
    assert prediction_interval(calm).high < 20 * 1.2  # +20 % is always seen


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([20.0] * 4, "4 recorded runs of the 5"),
        ([20.0, 20.1, 0.0, 20.2, 20.3], "a placeholder"),
        ([20.0, 20.1, math.nan, 20.2, 20.3], "a placeholder"),
        ([20.0, 20.1, math.inf, 20.2, 20.3], "a placeholder"),
        ([20.0, 20.1, -1.0, 20.2, 20.3], "a placeholder"),
        ([20.0] * 5, "no clock repeats itself"),
    ],
)
def test_what_is_no_baseline_is_refused(runs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prediction_interval(runs)


def test_it_is_a_factor_each_way_and_a_gate_up_to_its_widest() -> None:
    interval = Interval(20.0, 1.1)
    assert (interval.low, interval.high) == (20.0 / 1.1, 20.0 * 1.1)
    assert (NARROWEST, WIDEST) == (0.01, 0.15)
    assert Interval(20.0, 1.15).useful
    assert not Interval(20.0, math.nextafter(1.15, 2)).useful


def test_five_runs_are_enough_and_fractions_of_a_millisecond_are_latencies() -> None:
    assert prediction_interval([0.5, 0.501, 0.5, 0.5, 0.5]).centre == pytest.approx(0.5002, rel=1e-4)


def test_without_scipy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ValueError, match="needs scipy: pip install"):
        prediction_interval([20, 20.1, 19.9, 20.05, 19.95])
