"""How much memory is free, and how much a process took."""

from __future__ import annotations

import gc
import subprocess
from dataclasses import dataclass
from typing import Any

import psutil
import torch

SAMPLE_EVERY = 0.01
"""Seconds between two looks at a process."""


def free_bytes(device: str) -> int | None:
    """Memory that is free on ``device``; None where it does not say."""
    kind = torch.device(device).type
    if kind == "cpu":
        return int(psutil.virtual_memory().available)
    module: Any = getattr(torch, kind, None)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else None


def release(device: str) -> None:
    """Give back to ``device`` what this process does not use any more, for another one to use."""
    gc.collect()
    memory: Any = getattr(torch, device.partition(":")[0], None)
    if hasattr(memory, "empty_cache"):
        memory.empty_cache()


@dataclass(frozen=True)
class Peak:
    """The most memory that a process had at one time, in bytes.

    Attributes:
        own: what it allocated. Pages of files, which the kernel takes back when it needs them, do not count.
        resident: all, pages of files included.
    """

    own: int
    resident: int


def peak_of(process: subprocess.Popen[Any], every: float = SAMPLE_EVERY) -> Peak:
    """Waits for ``process`` and looks at its memory meanwhile. Linux."""
    own = resident = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory = watched.memory_info()
        except psutil.Error:  # it has just ended
            break
        own, resident = max(own, memory.rss - memory.shared), max(resident, memory.rss)
        try:
            process.wait(every)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    return Peak(own, resident)
