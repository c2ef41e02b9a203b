"""`qwen2-npu nightly`: its exit status, and a report whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwen2_npu.cli import main, nightly
from qwen2_npu.conformance.report import nightly as engine
from qwen2_npu.conformance.report.nightly import Stage


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *statuses: int, report: int = 0) -> tuple[int, list[str]]:
    """The command with stages of these statuses; what it gives to `report`."""
    asked: list[str] = []

    def made(command: list[str], check: bool) -> Any:
        asked.extend(command)
        (tmp_path / "summary.md").write_text("## x\n", encoding="utf-8")
        return subprocess.CompletedProcess(command, report)

    done = [Stage(f"s{i}", ("x",), status=status) for i, status in enumerate(statuses)]
    monkeypatch.setattr(engine, "run", lambda options, say: done)
    monkeypatch.setattr(nightly.subprocess, "run", made)
    result = CliRunner().invoke(main, ["nightly", "--results", str(tmp_path), *(["--quick"] if report == 9 else [])])
    return result.exit_code, asked


@pytest.mark.parametrize(
    ("statuses", "report", "status"), [((0, 0), 0, 0), ((0, 1), 0, 1), ((0, 0), 1, 1), ((0, None), 0, 1)]
)
def test_exit_status(statuses: Any, report: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = run(tmp_path, monkeypatch, *statuses, report=report)
    assert found == status
    assert "--check" in asked, "the report is made, and asked for regressions"
    assert "--append" in asked


def test_quick_runs_stay_out_of_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--append" not in run(tmp_path, monkeypatch, 0, report=9)[1]


def test_the_summary_is_shown_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "github.md"
    shown.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(shown))
    run(tmp_path, monkeypatch, 1)
    assert shown.read_text(encoding="utf-8") == "before\n## x\n"


def test_what_would_spoil_the_end_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder tests: nightly runs in a checkout"):
        nightly._check(tmp_path)


def test_describes_the_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["nightly", "--machine", str(tmp_path / "m.json"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["verified"].startswith("cpu")


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine(tmp_path: Path) -> None:
    """What CI runs, in the few minutes that its fast lane takes."""
    command = [sys.executable, "-m", "qwen2_npu.cli", "nightly", "--quick", "--results", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {"run.json", "index.html", "summary.md", "doctor.zip"} <= {path.name for path in tmp_path.iterdir()}
