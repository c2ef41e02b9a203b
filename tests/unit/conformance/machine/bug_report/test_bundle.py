"""One archive, whole or not at all, with nothing in it that should not leave the machine."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.bug_report import bundle, catalogue, device_probes
from qwen2_npu.conformance.machine.bug_report.redaction import Redaction
from qwen2_npu.conformance.operators import CATALOGUE

CLEAN = Redaction(home="/home/mei.lin", user="mei.lin", host="atlas-17")


def read(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def write(path: Path, *parts: bundle.BundlePart) -> dict[str, str]:
    bundle.write(path, "cpu", "python: 3.11\n", parts=parts, redaction=CLEAN)
    return read(path)


def test_texts_and_values_are_cleaned(tmp_path: Path) -> None:
    files = write(
        tmp_path / "b.zip",
        lambda: [("a.json", {"path": '/home/mei.lin/"x"', "nan": float("nan")}), ("b.txt", "mei.lin")],
        lambda: [("logs/c.log", "from 10.0.0.1 API_KEY=abc")],
    )
    assert json.loads(files["a.json"]) == {"path": '~/"x"', "nan": "nan"}
    assert files["b.txt"] == "USER"
    assert files["logs/c.log"] == "from ADDRESS API_KEY=…"
    assert files["doctor.txt"] == "python: 3.11\n"
    assert "README.txt" in files


def test_what_breaks_is_written_and_the_rest_too(tmp_path: Path) -> None:
    def broken() -> Iterable[tuple[str, Any]]:
        raise RuntimeError("no libascend at /home/mei.lin/lib")

    files = write(tmp_path / "b.zip", broken, lambda: [("a.txt", "still here")])
    assert files["a.txt"] == "still here"
    assert "RuntimeError: no libascend at ~/lib" in files["problems.txt"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "b.zip")
    assert list(tmp_path.iterdir()) == []


def test_everything_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one operator and one question in place of all."""
    run = catalogue.run
    one = [CATALOGUE["npu_swiglu"]]
    monkeypatch.setattr(catalogue, "run", lambda device, progress: run(device, one, progress))
    monkeypatch.setattr(device_probes, "QUESTIONS", device_probes.QUESTIONS[-3:])
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("EXE_MODE", "eager")
    bundle.write(tmp_path / "b.zip", "cpu", "x")
    files = read(tmp_path / "b.zip")
    assert {"environment.json", "provenance.json", "operators.json", "probes.json"} <= files.keys()
    assert "problems.txt" not in files, files["problems.txt"]
    assert json.loads(files["environment.json"])["variables"]["EXE_MODE"] == "eager"
    assert json.loads(files["operators.json"])["verified"] == "cpu (portable kernels)"
    assert json.loads(files["operators.json"])["totals"]["npu_swiglu"]["failed"] == 0
    assert {answer["answered_by"] for answer in json.loads(files["probes.json"])["answers"]} == {"cpu"}
    everything = "".join(files.values())
    assert "hf_very_secret" not in everything
    home = str(Path.home())
    assert f"{home}/" not in everything
