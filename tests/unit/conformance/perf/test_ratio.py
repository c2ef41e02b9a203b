"""Ratios of interleaved durations: coverage of the interval, drift that cancels, and verdicts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from qwen2_npu.conformance.perf.ratio import FEWEST_ROUNDS, Ratio, failure, measure_ratio, ratio_of, take_turns


def noisy(mean: float, spread: float, seed: int) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: mean * math.exp(generator.gauss(0, spread))


def test_the_interval_holds_the_true_ratio() -> None:
    outside, widths = 0, list[float]()
    for seed in range(60):
        slow, fast = noisy(30, 0.1, seed), noisy(20, 0.1, seed + 1000)
        ratio = ratio_of([slow() for _ in range(16)], [fast() for _ in range(16)], seed=seed)
        outside += not ratio.low <= 1.5 <= ratio.high
        widths.append(ratio.high / ratio.low)
    assert outside <= 5  # 2 % promised, a percentile bootstrap of 16 rounds keeps about 4
    # Rounds spread by 0.14, their median by a third of that: the interval is the median's.
    assert 1.1 < sum(widths) / len(widths) < 1.3


def test_drift_of_the_machine_cancels() -> None:
    drift = [1 + 0.5 * math.sin(turn / 3) for turn in range(16)]
    ratio = ratio_of([30 * d for d in drift], [20 * d for d in drift])
    assert (ratio.low, ratio.high) == (pytest.approx(1.5), pytest.approx(1.5))


def test_turns_rotate() -> None:
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) or 1.0 for name in ("a", "b", "c")}
    found = take_turns(candidates, 3)  # type: ignore[arg-type]
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(durations) for name, durations in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_an_undecided_ratio_takes_more_rounds_and_then_fails() -> None:
    decided = measure_ratio(noisy(20, 0.02, 1), noisy(10, 0.02, 2), 1.5)
    assert decided.rounds == FEWEST_ROUNDS
    for required in (1.4, 1.5, 1.6):  # below and above what it seems to be
        undecided = measure_ratio(noisy(15, 0.3, 1), noisy(10, 0.3, 2), required, most=36)
        assert undecided.rounds == 36
        assert undecided.low < required < undecided.high
        assert "is not shown to be as fast as required" in str(failure(undecided, required, "decode"))


def test_verdicts() -> None:
    ratio = Ratio(1.2, 1.1, 1.3, 16)
    assert failure(ratio, 1.1, "decode") is None
    assert failure(ratio, 1.4, "decode") == (
        "decode is slower than required: ratio 1.20 (1.10 to 1.30 with 98% confidence, 16 rounds), at "
        "least 1.40 required"
    )


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ([1.0] * 4, [1.0] * 4, "4 and 4 rounds"),
        ([1.0] * 12, [1.0] * 13, "12 and 13 rounds"),
        ([1.0] * 12, [0.0] * 12, "the clock did not run"),
    ],
)
def test_what_gives_no_ratio(reference: list[float], candidate: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_of(reference, candidate)
