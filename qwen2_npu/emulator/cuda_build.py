"""A CUDA build of PyTorch beside torch_npu: what PyPI's ``torch`` is on x86-64, and torch_npu was not made for.

Both register settings of their memory allocators when their libraries are loaded, under the same names, and PyTorch
ends the process where a name comes twice (``registerDeviceConfigParserHook`` in c10/core/AllocatorConfig.h). On an
emulated NPU no CUDA memory is allocated, so CUDA's names are taken off the list before torch_npu registers its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen2_npu.emulator.settings import EmulatorError

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of CPU builds."""

INSTALL_TORCH = f"pip install --extra-index-url {CPU_INDEX} torch==2.13.0"

REPLACE_TORCH = f"pip install --force-reinstall --no-deps --index-url {CPU_INDEX} torch==2.13.0"
"""Puts the CPU build in the place of another one."""

TRIED = "2.13.0+cu"
"""How the version of the builds starts beside which torch_npu was tried."""

GPU_LIBRARIES = ("libc10_cuda.so", "libc10_hip.so")

_MUTABLE_KEYS = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev"
"""``c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys()``: reference to the std::unordered_set."""

GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Files that exist where the machine has a GPU that PyTorch can use."""

_SET = struct.Struct("@PNPNfxxxxNP")
"""libstdc++'s ``_Hashtable``: buckets, how many, first node, elements, load factor, next resize, the only bucket."""

_MOST_NAMES = 1000
"""A list that claims more names is something else."""


@functools.cache
def installed() -> str:
    """Version of an installed torch that is a GPU build, as ``2.13.0+cu130``; empty for a CPU build or no torch.

    Reads files only: importing such a torch beside torch_npu is what fails.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    folder = Path(spec.origin).parent
    if not any((folder / "lib" / name).exists() for name in GPU_LIBRARIES):
        return ""
    with contextlib.suppress(OSError):
        found = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text(encoding="utf-8"))
        if found:
            return found[1]
    return "of unknown version"


def refuse_beside_npu() -> None:
    """Raise where a real NPU's torch_npu would meet a GPU build.

    Raises:
        EmulatorError: with the command that installs the CPU build.
    """
    if installed():
        raise EmulatorError(
            f"torch {installed()} is a GPU build, and torch_npu ends the process beside it: {REPLACE_TORCH}"
        )


def refuse_untried(environment: Mapping[str, str] = os.environ) -> None:
    """Raise, before anything is loaded, for a GPU build beside which torch_npu cannot be imported.

    Raises:
        EmulatorError: another build than those that were tried, or a GPU that torch would take as its accelerator.
    """
    version = installed()
    if not version:
        return
    if not version.startswith(TRIED):
        raise EmulatorError(
            f"torch {version} is a GPU build, and torch_npu ends the process beside it: {REPLACE_TORCH}"
        )
    if environment.get("CUDA_VISIBLE_DEVICES") != "" and any(driver.exists() for driver in GPU_DRIVERS):
        raise EmulatorError(
            f"torch {version} sees a GPU, and torch_npu allows no second accelerator: hide the GPU with "
            f"CUDA_VISIBLE_DEVICES= before the command, or install the CPU build: {REPLACE_TORCH}"
        )


@contextlib.contextmanager
def without_clash() -> Iterator[None]:
    """Let torch_npu be imported beside a CUDA build: CUDA's names leave PyTorch's list.

    Only settings of CUDA's allocator are read by these names, and beside an emulated NPU it allocates nothing.

    Raises:
        EmulatorError: the list is not laid out as expected.
    """
    if installed():
        _import_torch_alone()
        names = getattr(ctypes.CDLL("libc10.so"), _MUTABLE_KEYS)
        names.restype = ctypes.c_void_p
        _empty(names())
    yield


def _import_torch_alone() -> None:
    """Load PyTorch's libraries without its autoload of torch_npu, as torch_npu itself does."""
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        importlib.import_module("torch")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _empty(address: int) -> None:
    """Make the set of strings at ``address`` an empty one; its nodes, a few hundred bytes, are not freed."""
    buckets, count, first, elements, load, _, _ = _SET.unpack(ctypes.string_at(address, _SET.size))
    plausible = buckets and first and 0 < elements <= count <= _MOST_NAMES and load == 1.0
    if not plausible:
        raise EmulatorError(f"torch {installed()} is laid out in another way than the builds tried: {REPLACE_TORCH}")
    only_bucket = address + _SET.size - struct.calcsize("P")
    ctypes.memmove(address, _SET.pack(only_bucket, 1, 0, 0, 1.0, 0, 0), _SET.size)
