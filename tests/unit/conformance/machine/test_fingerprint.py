"""What is in a fingerprint, and that everything in it counts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qwen2_npu.conformance.machine import fingerprint
from qwen2_npu.conformance.machine.fingerprint import SETTINGS, Fingerprint, of_device


def test_it_holds_what_moves_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    identity = of_device("cpu").identity
    for name in (
        "soc", "hbm_bytes", "cards", "host_cpu", "torch", "torch_npu", "transformers", "cann", "driver", "firmware",
        "affinity", "governor", *SETTINGS,
    ):  # fmt: skip
        assert name in identity
    assert identity["TASK_QUEUE_ENABLE"] == "2"
    assert identity["host_cpu"]
    assert identity["torch"]
    assert "commit" not in identity  # a baseline judges later commits
    assert "PYTORCH_NPU_ALLOC_CONF" in identity


@pytest.mark.parametrize("key", of_device("cpu").identity)
def test_any_difference_is_another_fingerprint(key: str) -> None:
    here = of_device("cpu")
    there = Fingerprint.read({**here.identity, key: "changed"})
    assert there.name != here.name
    assert here.differences(there) == [f"{key}: {here.identity[key]} → changed"]
    assert here.differences(here) == []
    assert Fingerprint.read({}).differences(Fingerprint.read({key: "new"})) == [f"{key}: None → new"]


def test_names_are_folders(tmp_path: Path) -> None:
    name = Fingerprint.read({"soc": "NVIDIA H100 80GB/HBM3"}).name
    assert name.startswith("NVIDIA-H100-80GB-HBM3-")
    (tmp_path / name).mkdir()


def test_driver_and_firmware_are_read_from_their_version_files(tmp_path: Path) -> None:
    info = tmp_path / "version.info"
    info.write_text("package_version=x\nVersion=24.1.rc2\ncompatible_version=[V1]\n")
    assert fingerprint._version_of(info) == "24.1.rc2"
    assert fingerprint._version_of(tmp_path / "absent") is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_run_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "checkout"
    module = root / "qwen2_npu" / "conformance" / "perf" / "fingerprint.py"
    module.parent.mkdir(parents=True)
    module.write_text("one\n", encoding="utf-8")
    monkeypatch.setattr(fingerprint, "__file__", str(module))
    assert fingerprint.commit() == {"commit": None, "dirty": None}  # an archive, not a checkout

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert fingerprint.commit() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("two\n", encoding="utf-8")
    assert fingerprint.commit() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
