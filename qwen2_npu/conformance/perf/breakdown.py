"""Where a decode step's time goes: measured by torch's profiler, and predicted by the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.conformance import cost_model
from qwen2_npu.conformance.graphs import baselines
from qwen2_npu.conformance.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import bench
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.sizes import Size

LINES = 12
"""Operators shown; the rest is under a few percent."""

WARM_UP = 2


@dataclass(frozen=True)
class Line:
    """One operator's own time in a decode step."""

    operator: str
    calls: int
    ms: float
    share: float


def profile(
    weights: Weights, step: str, mode: str, device: str, dtype: torch.dtype, batch: int, tokens: int
) -> list[Line]:
    """Own time per operator on the host's clock, the largest first."""
    model = bench.build(weights, step, mode, device, dtype)
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    token = ids[:, :1].contiguous()
    with torch.no_grad():
        cache = {CACHE_NAME: cache_of(model(ids, use_cache=True))}
        for _ in range(WARM_UP):
            model(token, use_cache=True, **cache)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            model(token, use_cache=True, **cache)
    events: list[Any] = [event for event in recorded.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return [
        Line(event.key, event.count, event.self_cpu_time_total / 1e3, event.self_cpu_time_total / total)
        for event in events[:LINES]
    ]


def predicted(size: Size, step: str, batch: int) -> list[cost_model.Part]:
    """Of a documented graph on the documented card, the largest first; empty where no graph is committed."""
    layered = baselines.load(baselines.Documented(size.name, "decode", batch, step))
    if layered is None:
        return []
    return cost_model.parts(layered.of(size.layers), cost_model.load(), HARDWARE[DOCUMENTED_SOC])[:LINES]
