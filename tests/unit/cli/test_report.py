"""`qwen2-npu report` as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen2_npu.cli import main
from qwen2_npu.cli import report as cli_report
from qwen2_npu.emulator.settings import VARIABLE
from tests.unit.conformance.report.synthetic import SLOW, Night, commit_of

assert cli_report.command.name == "report"


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page itself has tests of its own."""
    monkeypatch.setattr("qwen2_npu.conformance.report.page.render", lambda *arguments: "<!DOCTYPE html>")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_page_history_and_summary(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    result = run("--results", tmp_path, "--append", "--summary", tmp_path / "s.md")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Nothing failed; ")
    assert (tmp_path / "index.html").exists()
    assert (tmp_path / "s.md").read_text(encoding="utf-8").startswith("## Nothing failed")
    assert len(list((tmp_path / "history").iterdir())) == 1


def test_check_fails_what_failed_and_what_is_no_longer_run(tmp_path: Path) -> None:
    first = Night(0).write(tmp_path / "0")
    assert run("--results", first, "--history", tmp_path / "h", "--append", "--check").exit_code == 0
    slow = Night(1, slower={SLOW: 1.3}).write(tmp_path / "1")
    result = run("--results", slow, "--history", tmp_path / "h", "--check")
    assert (result.exit_code, result.output.splitlines()[0]) == (
        1,
        f"1 check regressed since {commit_of(0)[:10]} (2026-10-01)",
    )
    assert run("--results", slow, "--history", tmp_path / "h").exit_code == 0
    lost = Night(2).write(tmp_path / "2")
    (lost / "graph.xml").unlink()
    result = run("--results", lost, "--history", tmp_path / "h", "--check")
    assert (result.exit_code, "passed before and were not run" in result.output) == (1, True)


def test_what_must_not_be_remembered_still_gets_its_page(tmp_path: Path) -> None:
    Night(0, self_test=True).write(tmp_path)
    result = run("--results", tmp_path, "--append")
    assert result.exit_code == 2
    assert "error: not added to the history" in result.output
    assert (tmp_path / "index.html").exists()


def test_nothing_at_all(tmp_path: Path) -> None:
    result = run("--results", tmp_path / "none", "--output", tmp_path / "page.html")
    assert (result.exit_code, result.output.splitlines()[0]) == (0, "Nothing was run")
    assert run("--results", tmp_path / "none", "--output", tmp_path / "page.html", "--check").exit_code == 1


@pytest.mark.slow
def test_the_page_is_made_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['qwen2-npu', 'report', '--results', sys.argv[1]]; "
        "from qwen2_npu.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    # Not as a child of an emulated process, which this one may be.
    plain = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    assert "the cost model cannot be loaded here" in (tmp_path / "index.html").read_text(encoding="utf-8")
