"""What a card reaches: the figures of ``conformance/machine/hardware.py`` that nobody has measured yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.conformance.machine.bug_report.probes import Answer
from qwen2_npu.conformance.machine.hardware import HARDWARE, Hardware
from qwen2_npu.conformance.machine.timers import timer_for

ABOVE = 1.02
"""A measurement so far above a figure refutes it: clocks are not exact."""


def bandwidth(device: str) -> Answer:
    """Of a copy on the device: reads and writes together."""
    source = torch.ones(256 << 20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), 20, device)
    reached = 2 * source.numel() * source.element_size() / seconds
    card = _card(device)
    return _compared(reached, None if card is None else card.memory_bandwidth.value, 1e12, "TB/s")


def peak(device: str) -> Answer:
    """Of one large product."""
    size = 8192
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    seconds = _seconds(lambda: matrix @ matrix, 10, device)
    card = _card(device)
    return _compared(2 * size**3 / seconds, None if card is None else card.bf16_peak.value, 1e12, "TFLOP/s")


def _seconds(work: Callable[[], Any], times: int, device: str) -> float:
    """The fastest of ``times`` runs, after two that warm up."""
    for _ in range(2):
        work()
    timer = timer_for(device.split(":")[0])
    for _ in range(times):
        timer.start()
        work()
        timer.stop()
    return min(timer.steps_ms()) / 1e3


def _card(device: str) -> Hardware | None:
    module: Any = getattr(torch, device.split(":")[0])
    return HARDWARE.get(module.get_device_name(0))


def _compared(reached: float, known: float | None, scale: float, unit: str) -> Answer:
    text = f"{reached / scale:.3g} {unit}"
    if known is None:
        return Answer(f"{text}; nothing is known of this card", None, {"reached": reached})
    agrees = reached <= known * ABOVE
    return Answer(f"{text}, {reached / known:.0%} of the known {known / scale:.3g}", agrees, {"reached": reached})
