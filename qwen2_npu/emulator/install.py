"""Puts the emulated device in place: CANN's libraries now, the rest when torch_npu and torchair are imported."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from qwen2_npu.emulator import cuda_build, environment, hooks, libraries, notices, runtime
from qwen2_npu.emulator.settings import Settings

TORCHAIR, NPUGRAPH_EX = "torchair.core._backend", "torch_npu.dynamo.npugraph_ex"
"""The modules of torch_npu's two graph compilers that set signal handlers when imported."""


def install(settings: Settings) -> None:
    """Load CANN's libraries and arm the hooks. Imports no torch."""
    cuda_build.refuse_untried()
    runtime.start(libraries.load(), settings)
    os.environ.update(environment.RUNTIME)
    hooks.after_import("torch_npu", _after_torch_npu, around=_around_torch_npu)
    hooks.after_import(TORCHAIR, _after_torchair, around=_own_signal_handlers)


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
    hooks.after_import(NPUGRAPH_EX, lambda module: None, around=_own_signal_handlers)


def _after_torchair(module: ModuleType) -> None:
    from qwen2_npu.emulator import ge

    ge.install(module)


def keep_signal_handlers() -> None:
    """Where nothing is emulated, too: torch_npu's graph compilers leave the program's handlers alone when imported."""
    for name in (TORCHAIR, NPUGRAPH_EX):
        hooks.after_import(name, lambda module: None, around=_own_signal_handlers)


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """torchair and npugraph_ex replace the handlers of SIGINT and SIGTERM when imported, by one that ignores the signal
    from then on: the program would not end. The user's stay, at every moment of the import."""
    if threading.current_thread() is not threading.main_thread():
        yield  # neither it nor the module can set any
        return
    right = signal.signal

    def without_the_two(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in (signal.SIGINT, signal.SIGTERM) else right(number, handler)

    signal.signal = without_the_two  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = right
