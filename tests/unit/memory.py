"""What Python allocates while something runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

RUNS = 3


def least_peak(run: Callable[[int], object]) -> int:
    """Bytes that Python held at most during ``run(number)``; the least of some runs, since a thread of pytest-xdist may
    allocate meanwhile."""
    peaks = []
    for number in range(RUNS):
        tracemalloc.start()
        try:
            run(number)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
