"""Controls of the emulated runtime: memory in use, its limit, and faults on allocation."""

from __future__ import annotations

import ctypes

from qwen2_npu.emulator.settings import EmulatorError, Settings

_library: ctypes.CDLL | None = None


def start(library: ctypes.CDLL, settings: Settings) -> None:
    """Hand the settings to the loaded library."""
    global _library
    library.emu_configure.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64)
    library.emu_set_hbm_bytes.argtypes = (ctypes.c_uint64,)
    library.emu_fail_allocation.argtypes = (ctypes.c_int64,)
    for name in ("emu_used_bytes", "emu_peak_bytes"):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_uint32,), ctypes.c_uint64
    library.emu_allocations.restype = ctypes.c_uint64
    library.emu_configure(settings.soc.encode(), settings.cann.encode(), settings.device_count, settings.hbm_bytes)
    _library = library


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        EmulatorError: the emulator is not active in this process.
    """
    if _library is None:
        raise EmulatorError("the emulator is not active: call qwen2_npu.emulator.activate() before importing torch")
    return _library


def used_bytes(device: int = 0) -> int:
    """Bytes the driver has handed out on ``device``: the caching allocator's blocks, used or not."""
    return int(library().emu_used_bytes(device))


def peak_bytes(device: int = 0) -> int:
    """The most ``used_bytes`` has been."""
    return int(library().emu_peak_bytes(device))


def allocations() -> int:
    """Allocations the driver has served, on all devices."""
    return int(library().emu_allocations())


def set_hbm_bytes(size: int) -> None:
    """Give every card ``size`` bytes from now on."""
    library().emu_set_hbm_bytes(size)


def fail_allocation(nth: int) -> None:
    """Let the ``nth`` driver allocation from now (1: the next) and all after it fail; 0 cancels."""
    library().emu_fail_allocation(nth)
