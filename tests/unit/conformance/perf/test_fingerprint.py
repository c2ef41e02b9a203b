"""What is in a fingerprint, and that everything in it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_npu.conformance.perf import fingerprint
from qwen2_npu.conformance.perf.fingerprint import SETTINGS, Fingerprint, of_device


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
    there = Fingerprint({**here.identity, key: "changed"})
    assert there.name != here.name
    assert here.differences(there) == [f"{key}: {here.identity[key]} → changed"]
    assert here.differences(here) == []


def test_names_are_folders(tmp_path: Path) -> None:
    name = Fingerprint({"soc": "NVIDIA H100 80GB/HBM3"}).name
    assert name.startswith("NVIDIA-H100-80GB-HBM3-")
    (tmp_path / name).mkdir()


def test_driver_and_firmware_are_read_from_their_version_files(tmp_path: Path) -> None:
    info = tmp_path / "version.info"
    info.write_text("package_version=x\nVersion=24.1.rc2\ncompatible_version=[V1]\n")
    assert fingerprint._version_of(info) == "24.1.rc2"
    assert fingerprint._version_of(tmp_path / "absent") is None


def test_a_run_knows_its_commit() -> None:
    commit = fingerprint.commit()
    assert set(commit) == {"commit", "dirty"}
