"""What is emulated: the card, how many, how much memory each has. Travels to child processes in one variable."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "QWEN2_NPU_EMULATOR"
"""Environment variable: the settings as JSON, for child processes."""

AUTOMATIC = "QWEN2_NPU_AUTO_EMULATE"
"""Environment variable: 0 keeps the emulator from being activated unless somebody asks for it."""

GIB = 1 << 30

HBM_GIB = {"Ascend910B1": 64, "Ascend910B2": 64, "Ascend910B3": 64, "Ascend910B4": 32, "Ascend910B4-1": 64}
"""SoC name -> HBM of one card in GiB. 910B4 is the Atlas 800I A2's."""

MAX_DEVICES = 64

CANN = "8.5.0"
"""Version reported unless another is asked for."""

MAX_BYTES = 1 << 63

_VERSION = re.compile(r"\d+\.\d+(\.\w+){0,3}", re.ASCII)


class EmulatorError(RuntimeError):
    """The emulated device cannot be provided, or was used wrongly."""


@dataclass(frozen=True)
class Settings:
    """One emulated host.

    Args:
        soc: the name ``torch.npu.get_device_name`` gives.
        device_count: cards, 1 to 64.
        hbm_bytes: memory of each card; 0 means what the SoC has. More is refused as the driver refuses it.
        cann: the CANN version reported.
    """

    soc: str = "Ascend910B4"
    device_count: int = 8
    hbm_bytes: int = 0
    cann: str = CANN

    def __post_init__(self) -> None:
        if not isinstance(self.soc, str) or self.soc not in HBM_GIB:
            raise EmulatorError(f"soc={_short(self.soc)} is not emulated; it must be one of {', '.join(HBM_GIB)}")
        if not _is_integer(self.device_count) or not 1 <= self.device_count <= MAX_DEVICES:
            raise EmulatorError(f"device_count={_short(self.device_count)} must be an integer from 1 to {MAX_DEVICES}")
        if not _is_integer(self.hbm_bytes) or not 0 <= self.hbm_bytes < MAX_BYTES:
            raise EmulatorError(f"hbm_bytes={_short(self.hbm_bytes)} must be a size in bytes, or 0 for the SoC's own")
        if not isinstance(self.cann, str) or not _VERSION.fullmatch(self.cann) or len(self.cann) > 32:
            raise EmulatorError(f"cann={_short(self.cann)} is not a version of CANN; one looks like {CANN}")
        if not self.hbm_bytes:
            object.__setattr__(self, "hbm_bytes", HBM_GIB[self.soc] * GIB)

    def but(self, **changes: Any) -> Settings:
        """These settings with some changed; another SoC brings its own memory size."""
        if "soc" in changes and changes["soc"] != self.soc and self.hbm_bytes == HBM_GIB[self.soc] * GIB:
            changes.setdefault("hbm_bytes", 0)
        return Settings(**{**asdict(self), **changes})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError, EmulatorError) as error:
            raise EmulatorError(
                f"{VARIABLE}={_short(text)} does not hold emulator settings ({error}): "
                "unset it, and let `qwen2-npu emulate` or activate() set it"
            ) from error


def _is_integer(value: object) -> bool:
    """Whether it is an int; bool is a subclass of int, and is refused."""
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    """For messages: a value from outside may be long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
