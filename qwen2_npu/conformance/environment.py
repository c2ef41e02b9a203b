"""What the software and the device are, and so what a result stands for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from qwen2_npu import emulator
from qwen2_npu.emulator import cuda_build

PACKAGES = ("torch", "torch_npu", "transformers", "numpy", "safetensors", "tokenizers", "deepspeed")


@dataclass(frozen=True)
class Environment:
    """``versions``: package -> version, None where it is not installed. ``verified``: on what, in words."""

    python: str
    platform: str
    versions: dict[str, str | None]
    cann: str | None
    device: str
    verified: str

    @classmethod
    def of(cls, device: str) -> Environment:
        return cls(
            python=platform.python_version(),
            platform=platform.platform(),
            versions={name: package_version(name) for name in PACKAGES},
            cann=cann_version(),
            device=device,
            verified=how_verified(device),
        )


def package_version(name: str) -> str | None:
    """Installed version, from metadata and files alone: nothing is imported. A GPU build of torch is named as such."""
    if name == "torch" and cuda_build.installed():
        return cuda_build.installed()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cann_version() -> str | None:
    """From the toolkit that ``ASCEND_HOME_PATH`` (or the default location) holds; None without one."""
    home = Path(os.environ.get("ASCEND_HOME_PATH") or "/usr/local/Ascend/ascend-toolkit/latest")
    candidates = [*home.glob("*/ascend_toolkit_install.info"), home / "version.cfg"]
    for info in candidates:
        try:
            lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition("=")
            if key.strip().lower() in ("version", "toolkit_installed_version"):
                return value.strip().strip("[]")
    return None


def how_verified(device: str) -> str:
    """What a result on ``device`` was computed by: ``emulated (…)``, ``npu (CANN …)``, ``cpu`` or ``cuda``."""
    kind = device.split(":")[0]
    if kind != "npu":
        return f"{kind} (portable kernels)"
    if emulator.is_active():
        return f"emulated (torch_npu {package_version('torch_npu')}, torchair)"
    return f"npu (CANN {cann_version() or 'unknown'})"
