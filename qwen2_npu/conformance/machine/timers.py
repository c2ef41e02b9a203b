"""Clocks around a model call. Both wait for the device before and after, as the guide does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol


class StepTimer(Protocol):
    """One ``start`` and one ``stop`` per step; afterwards the milliseconds of all."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def steps_ms(self) -> list[float]:
        """Of every step, by the better clock there is."""

    def wall_ms(self) -> list[float]:
        """Of every step by the host's clock, where ``steps_ms`` has another; else empty."""


class HostTimer:
    """The host's clock.

    Args:
        synchronize: waits until the device has finished all it was given.
        clock: seconds.
    """

    def __init__(self, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize, self._clock = synchronize, clock
        self._started = 0.0
        self._steps: list[float] = []

    def start(self) -> None:
        self._synchronize()
        self._started = self._clock()

    def stop(self) -> None:
        self._synchronize()
        self._steps.append((self._clock() - self._started) * 1e3)

    def steps_ms(self) -> list[float]:
        return self._steps

    def wall_ms(self) -> list[float]:
        return []


class EventTimer:
    """The device's own clock, by events in its stream, beside the host's.

    Args:
        device: ``torch.npu`` or ``torch.cuda``: what has ``Event`` and ``synchronize``.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._host = HostTimer(device.synchronize)
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._host.start()
        pair = (self._device.Event(enable_timing=True), self._device.Event(enable_timing=True))
        self._events.append(pair)
        pair[0].record()

    def stop(self) -> None:
        self._events[-1][1].record()
        self._host.stop()

    def steps_ms(self) -> list[float]:
        return [float(start.elapsed_time(stop)) for start, stop in self._events]

    def wall_ms(self) -> list[float]:
        return self._host.steps_ms()


def timer_for(kind: str) -> StepTimer:
    """Device events where the device has them.

    Args:
        kind: type of a torch device.
    """
    if kind == "cpu":
        return HostTimer(lambda: None)
    import torch

    return EventTimer(getattr(torch, kind))
