"""Where a result was computed: real NPU, emulated NPU, or portable kernels. The words, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Verified:
    """What computed a result, and the text that files hold of it, which has the details."""

    where: Where = Where.NOT_SAID
    text: str = ""

    @classmethod
    def read(cls, text: str | None) -> Verified:
        """From the text in a file: ``NOT_SAID`` where its first word is not a device of this project."""
        text = text or ""
        return cls(_WHERES.get(text.split(" ")[0], Where.NOT_SAID), text)

    @classmethod
    def of(cls, where: Where, details: str) -> Verified:
        """With the text that :meth:`read` reads."""
        return cls(where, f"{where.device} ({details})")

    @classmethod
    def on(cls, device: str) -> Verified:
        """A result that this process computes on ``device``: ``npu (CANN …)``, ``emulated (…)``, ``cpu (…)``."""
        where = place(device)
        if where is Where.NPU:
            return cls.of(where, f"CANN {cann_version() or 'unknown'}")
        if where is Where.EMULATED:
            return cls.of(where, f"torch_npu {package_version('torch_npu')}, torchair")
        return cls(where, f"{device.split(':')[0]} (portable kernels)")

    def __str__(self) -> str:
        return self.text


NOT_SAID = Verified()
"""Of what says nothing of it."""


def place(device: str) -> Where:
    """What computes on ``device`` in this process; ``NOT_SAID`` for a device that this project does not know."""
    kind = device.split(":")[0]
    return Where.EMULATED if kind == "npu" and emulator.is_active() else _WHERES.get(kind, Where.NOT_SAID)
