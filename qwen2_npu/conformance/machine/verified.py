"""Where a result was computed: real NPU, emulated NPU, or portable kernels. The words, and what they stand for."""

from __future__ import annotations

from enum import StrEnum

from qwen2_npu import emulator
from qwen2_npu.conformance.machine.packages import cann_version, package_version


class Where(StrEnum):
    """What computed a result. A result of one must never be shown as a result of another."""

    NPU = "real NPU"
    EMULATED = "emulated"
    CPU = "cpu"
    CUDA = "cuda"
    NOT_SAID = "not said"

    @property
    def device(self) -> str:
        """As ``--device`` takes it; empty for ``NOT_SAID``."""
        return _DEVICES.get(self, "")


_DEVICES = {Where.NPU: "npu", Where.EMULATED: "emulated", Where.CPU: "cpu", Where.CUDA: "cuda"}
"""The first word of the text in files, and the device's name for ``--device``."""

_WHERES = {word: kind for kind, word in _DEVICES.items()}


def where(verified: str | None) -> Where:
    """Of the text in a file, see :func:`written`; ``NOT_SAID`` for any other text."""
    return _WHERES.get((verified or "").split(" ")[0], Where.NOT_SAID)


def written(kind: Where, details: str) -> str:
    """The text that files hold; :func:`where` reads it."""
    return f"{kind.device} ({details})"


def place(device: str) -> Where:
    """What computes on ``device`` in this process; ``NOT_SAID`` for a device that this project does not know."""
    kind = device.split(":")[0]
    return Where.EMULATED if kind == "npu" and emulator.is_active() else _WHERES.get(kind, Where.NOT_SAID)


def how_verified(device: str) -> str:
    """What a result on ``device`` was computed by: ``emulated (…)``, ``npu (CANN …)``, ``cpu`` or ``cuda``."""
    kind = place(device)
    if kind is Where.NPU:
        return written(kind, f"CANN {cann_version() or 'unknown'}")
    if kind is Where.EMULATED:
        return written(kind, f"torch_npu {package_version('torch_npu')}, torchair")
    return f"{device.split(':')[0]} (portable kernels)"
