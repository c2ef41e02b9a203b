"""Clocks on a device that works in the background, as accelerators do."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2_npu.conformance.machine.timers import EventTimer, HostTimer, timer_for

WORK_SECONDS = 0.02
LONG_WORK_SECONDS = 0.4
"""Much more than a busy machine lets a thread wait for its core."""


class BackgroundDevice:
    """Launches return at once; ``synchronize`` waits for what was launched. Events note when the queue reaches them."""

    def __init__(self) -> None:
        self._queue = ThreadPoolExecutor(max_workers=1)
        self._last: Future[Any] | None = None

    def launch(self, seconds: float) -> None:
        self._last = self._queue.submit(time.sleep, seconds)

    def synchronize(self) -> None:
        if self._last is not None:
            self._last.result()

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802 - torch's name
        device = self

        class Event:
            def record(self) -> None:
                device._last = self.reached = device._queue.submit(time.perf_counter)

            def elapsed_time(self, end: Any) -> float:
                return float(end.reached.result() - self.reached.result()) * 1e3

        assert enable_timing
        return Event()


@pytest.fixture
def device() -> BackgroundDevice:
    return BackgroundDevice()


def test_a_synchronized_clock_sees_the_work(device: BackgroundDevice) -> None:
    timer = HostTimer(device.synchronize)
    device.launch(WORK_SECONDS)  # earlier work is not counted
    timer.start()
    device.launch(WORK_SECONDS)
    timer.stop()
    (ms,) = timer.steps_ms()
    assert ms >= 0.9 * WORK_SECONDS * 1e3
    assert timer.wall_ms() == []


def test_a_missing_synchronize_shows_next_to_nothing(device: BackgroundDevice) -> None:
    """What the floor and the wall-against-device check exist for."""
    timer = HostTimer(lambda: None)
    timer.start()
    device.launch(LONG_WORK_SECONDS)
    timer.stop()
    assert timer.steps_ms()[0] < 0.5 * LONG_WORK_SECONDS * 1e3
    device.synchronize()


def test_events_measure_the_device_beside_the_host(device: BackgroundDevice) -> None:
    timer = EventTimer(device)
    for _ in range(2):
        timer.start()
        device.launch(WORK_SECONDS)
        timer.stop()
    assert len(timer.steps_ms()) == len(timer.wall_ms()) == 2
    for step, wall in zip(timer.steps_ms(), timer.wall_ms(), strict=True):
        assert 0.9 * WORK_SECONDS * 1e3 <= step <= wall


def test_events_stand_between_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of them they would time the waiting, too, or be read before the device has reached them."""
    said: list[str] = []
    event = SimpleNamespace(record=lambda: said.append("event"))
    timer = EventTimer(SimpleNamespace(synchronize=lambda: said.append("wait"), Event=lambda **_: event))
    timer.start()
    said.append("work")
    timer.stop()
    assert said == ["wait", "event", "work", "event", "wait"]
    assert 0 < timer.wall_ms()[0] < 1e6


def test_the_device_at_hand_has_a_clock(device: BackgroundDevice) -> None:
    kinds = ["cpu", *(kind for kind in ("npu", "cuda") if hasattr(torch, kind) and getattr(torch, kind).is_available())]
    for kind in kinds:
        timer = timer_for(kind)
        timer.start()
        torch.ones(8, device=kind).sum()
        timer.stop()
        assert timer.steps_ms()[0] > 0
        assert len(timer.wall_ms()) == (0 if kind == "cpu" else 1)
