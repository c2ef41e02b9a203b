"""Where a result was computed: real NPU, emulated NPU, or portable kernels. The words, and what they stand for."""

from __future__ import annotations

from enum import StrEnum

from qwen2_npu import emulator
from qwen2_npu.conformance.machine.packages import cann_version, package_version


class Where(StrEnum):
    """What computed a result. One never passes for another."""

    NPU = "real NPU"
    EMULATED = "emulated"
    CPU = "cpu"
    CUDA = "cuda"
    NOT_SAID = "not said"


_FIRST_WORD = {"npu": Where.NPU, "emulated": Where.EMULATED, "cpu": Where.CPU, "cuda": Where.CUDA}


def where(verified: str | None) -> Where:
    """Of the text that :func:`how_verified` makes; ``NOT_SAID`` for any other text."""
    return _FIRST_WORD.get((verified or "").split(" ")[0], Where.NOT_SAID)


def how_verified(device: str) -> str:
    """What a result on ``device`` was computed by: ``emulated (…)``, ``npu (CANN …)``, ``cpu`` or ``cuda``."""
    kind = device.split(":")[0]
    if kind != "npu":
        return f"{kind} (portable kernels)"
    if emulator.is_active():
        return f"emulated (torch_npu {package_version('torch_npu')}, torchair)"
    return f"npu (CANN {cann_version() or 'unknown'})"
