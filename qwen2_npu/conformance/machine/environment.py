"""What the software and the device are, and so what a result stands for."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

from qwen2_npu.conformance.machine.packages import cann_version, package_version
from qwen2_npu.conformance.machine.verified import Verified

PACKAGES = ("torch", "torch_npu", "transformers", "numpy", "safetensors", "tokenizers", "deepspeed")


@dataclass(frozen=True)
class Environment:
    """``versions``: package -> version, None where it is not installed. ``verified``: on what."""

    python: str
    platform: str
    versions: dict[str, str | None]
    cann: str | None
    device: str
    verified: Verified

    @classmethod
    def of(cls, device: str) -> Environment:
        return cls(
            python=platform.python_version(),
            platform=platform.platform(),
            versions={name: package_version(name) for name in PACKAGES},
            cann=cann_version(),
            device=device,
            verified=Verified.on(device),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "verified": self.verified.text}
