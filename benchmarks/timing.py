"""Durations of calls that take turns, so that a slow moment of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from qwen2_npu.conformance.perf.ratio import take_turns


def seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Of one call: the mean of ``calls`` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def medians(
    candidates: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 1, calls: int = 1
) -> dict[str, float]:
    """Seconds per call of every candidate: its median over ``rounds``, after ``warm_up`` more."""
    turns = {name: lambda call=call: seconds(call, calls) for name, call in candidates.items()}
    return {name: statistics.median(found[warm_up:]) for name, found in take_turns(turns, warm_up + rounds).items()}
