"""Puts the emulated device in place: CANN's libraries now, the rest when torch_npu and torchair are imported."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import ModuleType

from qwen2_npu.emulator import cuda_build, environment, hooks, libraries, notices, runtime
from qwen2_npu.emulator.settings import Settings


def install(settings: Settings) -> None:
    """Load CANN's libraries and arm the hooks. Imports no torch."""
    cuda_build.refuse_untried()
    runtime.start(libraries.load(), settings)
    os.environ.update(environment.RUNTIME)
    hooks.after_import("torch_npu", _after_torch_npu, around=_around_torch_npu)
    hooks.after_import("torchair.core._backend", _after_torchair, around=_own_signal_handlers)


@contextlib.contextmanager
def _around_torch_npu() -> Iterator[None]:
    with environment.toolkit_after(), notices.without_toolkit_warning(), cuda_build.without_clash():
        yield


def _after_torch_npu(module: ModuleType) -> None:
    from qwen2_npu.emulator import aclgraph, collectives, eager

    collectives.install()
    eager.install()
    aclgraph.install()
    notices.without_padding_notice(module)


def _after_torchair(module: ModuleType) -> None:
    from qwen2_npu.emulator import ge

    ge.install(module)


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
