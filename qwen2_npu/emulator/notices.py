"""What torch_npu prints on every start that says nothing to a user of the emulated device."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TextIO, cast

TOOLKIT = "Warning: ASCEND_HOME_PATH"
"""How the line starts that asks for CANN's environment, which is not there."""

ERRORS_ONLY = 2
"""PyTorch's C++ log level."""


@contextlib.contextmanager
def without_toolkit_warning() -> Iterator[None]:
    """Hide torch_npu's notice that ASCEND_HOME_PATH is not set while it is imported (see ``environment``)."""
    with contextlib.redirect_stdout(cast(TextIO, _Filter(sys.stdout))):
        yield


class _Filter:
    """A text stream without one of its lines."""

    def __init__(self, stream: object) -> None:
        self._stream = stream
        self._swallow_newline = False

    def write(self, text: str) -> int:
        if text.startswith(TOOLKIT):
            self._swallow_newline = not text.endswith("\n")
            return len(text)
        if self._swallow_newline and text == "\n":
            self._swallow_newline = False
            return 1
        return int(self._stream.write(text))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def without_padding_notice(torch_npu: ModuleType) -> None:
    """Hide the message of the first allocation.

    With every SoC before Ascend950, torch_npu 2.13 pads allocations by 32 bytes and says so once per process, on real
    cards, too, whatever the version of CANN. The padding stays; the message is hidden.
    """
    torch_npu.npu._lazy_call(_allocate_quietly)


def _allocate_quietly() -> None:
    import torch

    npu = torch.npu  # type: ignore[attr-defined]  # put there by torch_npu
    with _errors_only():
        torch.empty(1, device="npu")
    # As if nothing had been allocated.
    npu.empty_cache()
    npu.reset_accumulated_memory_stats()
    npu.reset_peak_memory_stats()


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL("libc10.so"), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # another build of PyTorch: the message is seen, nothing else changes
        yield
        return
    before = level.value
    level.value = max(before, ERRORS_ONLY)
    try:
        yield
    finally:
        level.value = before
