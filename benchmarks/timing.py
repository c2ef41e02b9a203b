"""Durations of calls that take turns, so that a slow moment of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from qwen2_npu.conformance.perf.ratio import take_turns

Clock = Callable[[], float]

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What to time with. "cpu" is the time that this process computes, all threads together: on a busy machine it leaves
out the waiting for others."""


def seconds(call: Callable[[], object], calls: int = 1, clock: Clock = time.perf_counter) -> float:
    """Of one call: the mean of ``calls`` in a row."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def medians(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    calls: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Seconds per call of every candidate: its median over ``rounds``, after ``warm_up`` more."""
    turns = {name: lambda call=call: seconds(call, calls, clock) for name, call in candidates.items()}
    return {name: statistics.median(found[warm_up:]) for name, found in take_turns(turns, warm_up + rounds).items()}
