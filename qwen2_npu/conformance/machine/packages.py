"""Versions of installed software, read without importing any of it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from qwen2_npu.emulator import cuda_build


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
