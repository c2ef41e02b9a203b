"""How much faster one candidate is than another, measured in one run: a ratio with a confidence interval.

Machines drift by tens of percent within minutes, so candidates take turns, round by round, in an order that rotates.
Each round gives one ratio; the estimate is their median, and its interval comes from resampling whole rounds (a
percentile bootstrap): what hits both candidates of a round cancels, and what hits one widens the interval.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.98
RESAMPLES = 2000
FEWEST_ROUNDS, MOST_ROUNDS = 12, 48


@dataclass(frozen=True)
class Ratio:
    """``reference / candidate`` of durations: above 1 the candidate is faster."""

    estimate: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        interval = f"{self.low:.2f} to {self.high:.2f} with {CONFIDENCE:.0%} confidence"
        return f"{self.estimate:.2f} ({interval}, {self.rounds} rounds)"


def take_turns(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One duration per candidate and round.

    Args:
        candidates: name -> runs once and returns its duration.
    """
    names = list(candidates)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(candidates[name]())
    return found


def ratio_of(reference: Sequence[float], candidate: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratio of durations that were taken in turns.

    Raises:
        ValueError: unequal or too few rounds, or durations that are none.
    """
    if len(reference) != len(candidate) or len(reference) < FEWEST_ROUNDS:
        raise ValueError(
            f"{len(reference)} and {len(candidate)} rounds: both candidates need the same {FEWEST_ROUNDS} or more"
        )
    if not all(math.isfinite(duration) and duration > 0 for duration in [*reference, *candidate]):
        raise ValueError("a duration is not positive: the clock did not run")
    rounds = [before / after for before, after in zip(reference, candidate, strict=True)]
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    tail = round(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Ratio(statistics.median(rounds), medians[tail], medians[-1 - tail], len(rounds))


def measure_ratio(
    reference: Callable[[], float], candidate: Callable[[], float], required: float, *, most: int = MOST_ROUNDS
) -> Ratio:
    """Take turns until the interval lies on one side of ``required``, or ``most`` rounds are done."""
    found: dict[str, list[float]] = {"reference": [], "candidate": []}
    while True:
        more = take_turns({"reference": reference, "candidate": candidate}, FEWEST_ROUNDS)
        for name, durations in more.items():
            found[name] += durations
        ratio = ratio_of(found["reference"], found["candidate"])
        if not ratio.low < required <= ratio.high or ratio.rounds >= most:
            return ratio


def failure(ratio: Ratio, required: float, what: str) -> str | None:
    """Why ``ratio`` does not show what is required; None where it does. What is not shown fails."""
    if ratio.low >= required:
        return None
    verdict = "is slower than required" if ratio.high < required else "is not shown to be as fast as required"
    return f"{what} {verdict}: ratio {ratio}, at least {required:.2f} required"
