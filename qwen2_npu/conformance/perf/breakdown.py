"""Where a decode step's time goes: measured by the device's profiler, and predicted by the cost model."""

from __future__ import annotations

import csv
import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen2_npu import emulator
from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import bench, cost_model
from qwen2_npu.conformance.perf.bench import BenchCase, Setup
from qwen2_npu.conformance.sizes import Size

LINES = 12
"""Operators shown; the rest is under a few percent."""

WARM_UP = 2

PREDICTED_CONTEXT = baselines.PAST
"""Tokens in the cache of the step that the cost model predicts, however many were measured with."""

KERNELS = "kernel_details.csv"
"""What torch_npu.profiler writes: a line per kernel that ran on the device."""

ERRORS_ONLY = "6"
"""Of KINETO_LOG_LEVEL, which torch reads when it profiles for the first time: below it, each profile is announced."""


@dataclass(frozen=True)
class Line:
    """One operator's own time in a decode step."""

    operator: str
    calls: int
    ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """``time``: whose time it is, in words. ``lines``: the largest first."""

    time: str
    lines: list[Line]


def profile(setup: Setup, case: BenchCase) -> Profile:
    """A decode step's own time per operator: of the device where it has a profiler, else of the host."""
    model = bench.build(setup, case.step)
    shape = (case.batch, setup.input_tokens)
    ids = torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    token = ids[:, :1].contiguous()
    with torch.no_grad():
        cache = {CACHE_NAME: cache_of(model(ids, use_cache=True))}
        for _ in range(WARM_UP):
            model(token, use_cache=True, **cache)
        return profile_of(lambda: model(token, use_cache=True, **cache), model.device.type)


def profile_of(call: Callable[[], Any], kind: str) -> Profile:
    """Of one call on a type of device."""
    os.environ.setdefault("KINETO_LOG_LEVEL", ERRORS_ONLY)
    if kind == "cuda":
        return Profile("device time of its kernels", cuda_time(call))
    if kind == "npu" and emulator.is_active():
        return Profile("host time of the emulator, which says nothing about an NPU", host_time(call))
    if kind == "npu":
        lines = npu_time(call, importlib.import_module("torch_npu"))
        if lines:
            return Profile("device time of its kernels", lines)
        return Profile(f"host time (torch_npu.profiler wrote no {KERNELS})", host_time(call))
    return Profile("host time", host_time(call))


def host_time(call: Callable[[], Any]) -> list[Line]:
    """Per operator, on the host's clock."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        call()
    return largest({event.key: (event.count, event.self_cpu_time_total) for event in recorded.key_averages()})


def cuda_time(call: Callable[[], Any]) -> list[Line]:
    """Per kernel, on the device's clock."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    # The operators that launched kernels are charged with the same time once more.
    kernels = [event for event in recorded.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return largest({event.key: (event.count, event.self_device_time_total) for event in kernels})


def npu_time(call: Callable[[], Any], torch_npu: Any) -> list[Line]:
    """Per type of operator, on the device's clock; empty where the profiler wrote nothing.

    Its profiler reports its own failures, and raises none.
    """
    profiler = torch_npu.profiler
    activity = profiler.ProfilerActivity
    # From level 1 on kernels come with the type of their operator.
    level = profiler._ExperimentalConfig(
        profiler_level=profiler.ProfilerLevel.Level1, aic_metrics=profiler.AiCMetrics.AiCoreNone
    )
    with tempfile.TemporaryDirectory() as folder:
        with profiler.profile(
            activities=[activity.CPU, activity.NPU],
            on_trace_ready=profiler.tensorboard_trace_handler(folder),
            experimental_config=level,
        ):
            call()
            torch_npu.npu.synchronize()
        files = sorted(Path(folder).rglob(KERNELS))
        return kernels_of(files[0]) if files else []


def kernels_of(path: Path) -> list[Line]:
    """What torch_npu.profiler wrote of every kernel, by type; by name where it gives no type."""
    found: dict[str, tuple[int, float]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            kind = row.get("Type", "").strip()
            name = kind if kind not in ("", "N/A") else row["Name"].strip()
            calls, time = found.get(name, (0, 0.0))
            found[name] = (calls + 1, time + float(row["Duration(us)"]))
    return largest(found)


def largest(found: dict[str, tuple[int, float]]) -> list[Line]:
    """Lines of name -> calls and microseconds; the shares are of all, those that are not shown too."""
    total = sum(time for _, time in found.values())
    longest = sorted(((name, *figures) for name, figures in found.items() if figures[1] > 0), key=lambda own: -own[2])
    return [Line(name, calls, time / 1e3, time / total) for name, calls, time in longest[:LINES]]


def predicted(size: Size, step: str, batch: int) -> list[tuple[cost_model.Part, str]]:
    """Of a documented graph on the documented card, the largest first, with its milliseconds as all fits have them;
    empty where no graph is committed."""
    found = baselines.at_full_size(baselines.DocumentedGraph(size.name, "decode", batch, step))
    if found is None:
        return []
    card = HARDWARE[DOCUMENTED_SOC]
    fits = [{part.operator: part for part in cost_model.parts(found, fit, card)} for fit in cost_model.load_all()]
    times = [[fit[name].seconds * 1e3 for fit in fits] for name in fits[0]]
    return [(part, cost_model.interval(ms, 2)) for part, ms in zip(fits[0].values(), times, strict=True)][:LINES]
