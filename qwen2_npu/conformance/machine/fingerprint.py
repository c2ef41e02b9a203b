"""What moves a latency and is not the code: card, host, versions and settings. Baselines never cross it.

The commit is kept beside each recorded run, not in the identity: a baseline is there to judge later commits.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qwen2_npu import emulator
from qwen2_npu.conformance.machine.host import Host
from qwen2_npu.conformance.machine.packages import cann_version, package_version
from qwen2_npu.conformance.machine.verified import Verified, Where

VERSIONS = ("torch", "torch_npu", "transformers", "deepspeed")
SETTINGS = (
    "TASK_QUEUE_ENABLE",
    "PYTORCH_NPU_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CPU_AFFINITY_CONF",
    "ASCEND_LAUNCH_BLOCKING",
    "OMP_NUM_THREADS",
)
"""Environment variables that change how fast the same program runs."""

ASCEND_HOME = Path("/usr/local/Ascend")


@dataclass(frozen=True)
class Fingerprint:
    """What two latencies must have in common to be compared.

    Attributes:
        identity: all of it, as files hold it. Values are strings, numbers or None.
        where: what computes there.
    """

    identity: Mapping[str, Any]
    where: Where

    @classmethod
    def read(cls, identity: Mapping[str, Any]) -> Fingerprint:
        """From the identity in a file."""
        verified = identity.get("verified")
        return cls(identity, Verified.read(verified if isinstance(verified, str) else None).where)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the identity."""
        text = json.dumps(dict(self.identity), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For people and for folders: the card and the digest."""
        card = self.identity.get("soc") or self.identity.get("device") or "unknown"
        card = re.sub(r"[^A-Za-z0-9.-]+", "-", str(card))
        return f"{card}-{self.digest}"

    def differences(self, other: Fingerprint) -> list[str]:
        """``key: here → there`` for everything that differs."""
        keys = {**self.identity, **other.identity}
        return [
            f"{key}: {self.identity.get(key)} → {other.identity.get(key)}"
            for key in keys
            if self.identity.get(key) != other.identity.get(key)
        ]


def of_device(device: str) -> Fingerprint:
    """The fingerprint of this process on ``device``. Imports torch for anything but a CPU."""
    kind = device.split(":")[0]
    host, verified = Host.read(), Verified.on(device)
    identity: dict[str, Any] = {
        "device": kind,
        "verified": verified.text,
        "soc": None,
        "hbm_bytes": None,
        "cards": 0,
        "product": _line(Path("/sys/class/dmi/id/product_name")),
        "machine": platform.machine(),
        "host_cpu": _cpu_model(),
        "host_cores": os.cpu_count(),
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30),
        "affinity": host.affinity_text,
        "governor": host.governor,
        **{name: package_version(name) for name in VERSIONS},
        "cann": None,
        "driver": None,
        "firmware": None,
        **{name: os.environ.get(name) for name in SETTINGS},
    }
    if kind in ("npu", "cuda"):
        identity |= _card(kind)
    if kind == "npu" and not emulator.is_active():
        identity |= {
            "cann": cann_version(),
            "driver": _version_of(ASCEND_HOME / "driver" / "version.info"),
            "firmware": _version_of(ASCEND_HOME / "firmware" / "version.info"),
        }
    return Fingerprint(identity, verified.where)


def commit() -> dict[str, Any]:
    """The checked-out commit, and whether files differ from it: the provenance of a run."""
    root = Path(__file__).parents[3]
    try:
        head = _git(root, "rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _card(kind: str) -> dict[str, Any]:
    import torch

    if kind == "npu":
        importlib.import_module("torch_npu")
    module: Any = getattr(torch, kind)
    return {
        "soc": module.get_device_name(0),
        "hbm_bytes": int(module.get_device_properties(0).total_memory),
        "cards": module.device_count(),
    }


def _cpu_model() -> str | None:
    """x86 says "model name"; Kunpeng's cores give their part numbers only, which name them as well."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())  # of the first core
    if "model name" in fields:
        return fields["model name"]
    parts = [fields.get(name) for name in ("CPU implementer", "CPU part", "CPU variant")]
    return " ".join(part for part in parts if part) or None


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _version_of(path: Path) -> str | None:
    """The value of ``Version=`` in a driver's or firmware's version.info."""
    for line in (_line(path) or "").splitlines():
        key, _, value = line.partition("=")
        if key.strip().lower() == "version":
            return value.strip()
    return None
