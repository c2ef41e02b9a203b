"""What the driver and CANN say, where they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen2_npu.conformance.machine.bug_report import logs


def test_versions(tmp_path: Path) -> None:
    path = tmp_path / "driver" / "version.info"
    path.parent.mkdir()
    path.write_text("Version=24.1.0.3\n", encoding="utf-8")
    assert list(logs.versions(tmp_path)) == [("versions/driver-version.info.txt", "Version=24.1.0.3\n")]
    assert list(logs.versions(tmp_path / "none")) == []


def test_only_errors_and_warnings_of_the_newest_logs(tmp_path: Path) -> None:
    for age in range(logs.NEWEST + 2):
        path = tmp_path / "debug" / f"plog-{age}.log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"[INFO] prompt: secret\n[ERROR] GE: failed {age}\n[WARNING] slow\n", encoding="utf-8")
        os.utime(path, (1000 - age, 1000 - age))
    found = dict(logs.cann(tmp_path))
    assert list(found) == [f"logs/{age}-plog-{age}.log" for age in range(logs.NEWEST)]
    assert found["logs/0-plog-0.log"] == "[ERROR] GE: failed 0\n[WARNING] slow\n"
    assert list(logs.cann(tmp_path / "none")) == []


def test_long_logs_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("[ERROR] x\n" * 5000, encoding="utf-8")
    assert dict(logs.cann(tmp_path))["logs/0-a.log"].count("\n") == logs.LINES


def test_commands_that_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "COMMANDS", {"a.txt": ("echo", "42"), "b.txt": ("no-such-command-here",)})
    assert dict(logs.commands()) == {"a.txt": "42\n"}
