"""Puts the emulated device in place: CANN's libraries now, the rest when torch_npu and torchair are imported."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

from qwen2_npu.emulator import hooks, libraries, runtime
from qwen2_npu.emulator.settings import Settings

NEEDED_ENVIRONMENT = {
    # torch_npu's queue would run copies in another thread, after the kernels here, which run at once.
    "TASK_QUEUE_ENABLE": "0",
}


def install(settings: Settings) -> None:
    """Load CANN's libraries and arm the hooks. Imports no torch."""
    runtime.start(libraries.load(), settings)
    os.environ.update(NEEDED_ENVIRONMENT)
    hooks.after_import("torch_npu", _after_torch_npu, around=_without_toolkit_warning)
    hooks.after_import("torchair.core._backend", _after_torchair, around=_own_signal_handlers)


def _after_torch_npu(module: ModuleType) -> None:
    from qwen2_npu.emulator import collectives, eager

    collectives.install()
    eager.install()


def _after_torchair(module: ModuleType) -> None:
    from qwen2_npu.emulator import ge

    ge.install(module)


@contextlib.contextmanager
def _without_toolkit_warning() -> Iterator[None]:
    """torch_npu prints that ASCEND_HOME_PATH is not set; here it cannot be."""
    with contextlib.redirect_stdout(_Filter(sys.stdout)):
        yield


class _Filter:
    """A text stream less one line."""

    def __init__(self, stream: object) -> None:
        self._stream = stream
        self._swallow_newline = False

    def write(self, text: str) -> int:
        if text.startswith("Warning: ASCEND_HOME_PATH"):
            self._swallow_newline = not text.endswith("\n")
            return len(text)
        if self._swallow_newline and text == "\n":
            self._swallow_newline = False
            return 1
        return int(self._stream.write(text))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """torchair replaces the handlers of SIGINT and SIGTERM when imported; give the user's back."""
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
