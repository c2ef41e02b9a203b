"""How far the next run may lie from the recorded ones: a prediction interval, not a number somebody picked.

Of n recorded runs take the logarithms, their mean m and their standard deviation s (n - 1 in the denominator). If runs
are alike, the logarithm of the next one lies within

    m ± t(1 - a/2, n - 1) · s · sqrt(1 + 1/n)

with probability 1 - a, where t is Student's quantile: few runs give a wide interval because their s is itself
uncertain, and more runs narrow it. The logarithm makes the interval a factor, the same for 20 ms and for 2 s. a = 0.01
per row.

Two bounds, so that the interval means something. It is never narrower than ± 1 %: runs of one evening do not show how
the host differs between evenings. And where it is wider than ± 15 %, the baseline is refused: it would not see +20 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MINIMUM_RUNS = 5
ERROR_RATE = 0.01
NARROWEST = 0.01
WIDEST = 0.15


@dataclass(frozen=True)
class Interval:
    """Where the next run is expected. ``factor``: half-width as a factor, above 1."""

    centre: float
    factor: float

    @property
    def low(self) -> float:
        return self.centre / self.factor

    @property
    def high(self) -> float:
        return self.centre * self.factor

    @property
    def useful(self) -> bool:
        """Narrow enough to be a gate."""
        return self.factor <= 1 + WIDEST


def prediction_interval(runs: Sequence[float]) -> Interval:
    """The interval of the module's text.

    Args:
        runs: one positive figure per recorded run.

    Raises:
        ValueError: fewer than five runs, or figures that cannot be measurements.
    """
    if len(runs) < MINIMUM_RUNS:
        raise ValueError(f"{len(runs)} recorded runs of the {MINIMUM_RUNS} that a margin needs")
    if not all(math.isfinite(run) and run > 0 for run in runs):
        raise ValueError(f"recorded runs {list(runs)} hold a value that is not a latency: a placeholder")
    if len(set(runs)) == 1:
        raise ValueError(
            f"all {len(runs)} recorded runs are exactly {runs[0]}: a placeholder, no clock repeats itself so"
        )
    logs = [math.log(run) for run in runs]
    quantile = _student_quantile(1 - ERROR_RATE / 2, len(runs) - 1)
    half = quantile * statistics.stdev(logs) * math.sqrt(1 + 1 / len(runs))
    return Interval(math.exp(statistics.fmean(logs)), max(math.exp(half), 1 + NARROWEST))


def _student_quantile(probability: float, degrees: int) -> float:
    """t with P(T ≤ t) = ``probability``."""
    try:
        from scipy.special import stdtrit  # scipy.stats has the same, and takes a second to import
    except ImportError as error:
        raise ValueError("the prediction interval needs scipy: pip install 'qwen2-npu[report]'") from error
    return float(stdtrit(degrees, probability))
