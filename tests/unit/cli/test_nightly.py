"""`qwen2-npu nightly`: its exit status, and a report whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from qwen2_npu.cli import main, nightly
from qwen2_npu.conformance.report import nightly as engine
from qwen2_npu.conformance.report.nightly import Stage
from qwen2_npu.conformance.report.own_files import locked
from tests.unit.conformance.test_children import GONE, all_gone

pytestmark = pytest.mark.usefixtures("hangups")


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *statuses: int, report: int = 0) -> tuple[int, list[str]]:
    """The command with stages of these statuses; what it gives to `report`."""
    asked: list[str] = []

    def made(command: list[str]) -> int:
        asked.extend(command)
        (tmp_path / "summary.md").write_text("## x\n", encoding="utf-8")
        return report

    def stages(options: engine.Options, say: Any, finish: Any) -> list[Stage]:
        finish()
        return [Stage(f"s{i}", ("x",), status=status) for i, status in enumerate(statuses)]

    monkeypatch.setattr(engine, "run", stages)
    monkeypatch.setattr(nightly, "_report", made)
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


@pytest.mark.parametrize(("flags", "appended"), [("", True), ("--no-append", False), ("--quick --append", True)])
def test_every_option_reaches_the_run_and_the_report(
    flags: str, appended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages run in another folder: relative names are made absolute."""
    given: list[Any] = []
    monkeypatch.setattr(engine, "run", lambda options, say, finish: given.append(options) or finish() or [])
    monkeypatch.setattr(nightly, "_report", lambda command: given.append(command) or 0)
    monkeypatch.chdir(tmp_path)
    options = f"--results r --history h --device cpu --model-path m --gate-rows 7b-* --workers 3 --minutes 5 {flags}"
    assert CliRunner().invoke(main, ["nightly", *options.split()]).exit_code == 0
    asked, report = given
    quick = "--quick" in flags
    assert asked == engine.NightlyOptions(tmp_path / "r", "cpu", tmp_path / "m", quick, "7b-*", 3, 5.0)
    names = ["--results", str(tmp_path / "r"), "--summary", str(tmp_path / "r" / "summary.md")]
    names += ["--history", str(tmp_path / "h"), *(["--append"] if appended else [])]
    assert report == [*engine.CLI, "report", "--check", *names]


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


def test_a_history_that_cannot_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["nightly", "--results", str(tmp_path / "new"), "--history", str(tmp_path / "file" / "history")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output == (
        f"error: {tmp_path}/file/history cannot be written (Not a directory): name another place\n"
    )
    assert not (tmp_path / "new").exists()


def test_results_that_are_a_link_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    result = CliRunner().invoke(main, ["nightly", "--no-append", "--results", str(tmp_path / "loop")])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith(f"error: {tmp_path}/loop cannot be written (")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "-inf", "1e9", "many"])
def test_minutes_that_no_stage_can_take(minutes: str) -> None:
    result = CliRunner().invoke(main, ["nightly", f"--minutes={minutes}"])
    assert result.exit_code == 2
    assert f"{minutes}: must be a positive number of minutes, at most 525600" in result.output


def test_a_summary_that_cannot_be_shown_changes_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/proc/nothing")
    assert run(tmp_path, monkeypatch, 0)[0] == 0


# ---- real processes -------------------------------------------------------------------------------------------------
NIGHTLY = """
import functools, sys
from pathlib import Path
from qwen2_npu.conformance.report import nightly
from qwen2_npu.cli import main

results, report = Path(sys.argv[1]), sys.argv[2]
nightly.CLI = (sys.executable, "-c", report, str(results))
long = nightly.Stage("long", (sys.executable, "-c", sys.argv[3]))
later = nightly.Stage("later", (sys.executable, "-c", "pass"))
nightly.run = functools.partial(nightly.run, machine=lambda options: long, plan=lambda options, verified: [later])
main(["nightly", "--results", str(results)])
"""
LONG = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True)
print("PIDS", os.getpid(), other.pid, flush=True)
time.sleep(120)
"""
REPORT = """
import sys
for name in ("index.html", "summary.md"):
    open(f"{sys.argv[1]}/{name}", "w").write("made")
"""
SLOW_REPORT = "import os, time; print('PIDS', os.getpid(), flush=True); time.sleep(120)"


@contextmanager
def started(results: Path, report: str = REPORT, long: str = LONG) -> Iterator[subprocess.Popen[str]]:
    """The command, with a stage that takes long."""
    command = [sys.executable, "-c", NIGHTLY, str(results), report, long]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def named(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that the next such line tells of."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        if line.startswith("PIDS "):
            return [psutil.Process(int(pid)) for pid in line.split()[1:]]
        seen.append(line)
    raise AssertionError("".join(seen))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_stage_and_the_page_is_made(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path) as process:
        family = named(process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"error: interrupted by {number.name}" in output
    assert all_gone(family)
    stages = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["stages"]
    assert [(stage["name"], stage["status"]) for stage in stages] == [("long", 128 + number), ("later", None)]
    assert stages[0]["problem"] == f"interrupted by {number.name}"
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "made"
    with locked(tmp_path):
        pass


def test_a_kill_leaves_no_process_and_no_lock(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        family = named(process)
        process.kill()
        process.wait()
    assert all_gone(family)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["stages"][0]["status"] is None
    with locked(tmp_path) as own:
        own.start(["run.json", "logs/long.log"])  # what was killed is no foreign file


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with started(tmp_path, report=SLOW_REPORT) as process:
        family = named(process)
        process.send_signal(signal.SIGTERM)
        family += named(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(GONE) == -signal.SIGTERM
    assert all_gone(family)
    with locked(tmp_path):
        pass


def test_a_second_run_in_the_folder_is_refused_at_once(tmp_path: Path) -> None:
    with started(tmp_path) as first:
        family = named(first)
        with started(tmp_path) as second:
            output, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert output == (
            f"error: another nightly run (process {first.pid}) writes into {tmp_path}: wait for its end, or name "
            "another --results\n"
        )
        assert family[0].is_running()
        assert (tmp_path / "logs" / "long.log").exists()


def test_an_output_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    """As after a lost connection: nobody reads what is printed."""
    waits = f"import os, time; print('PIDS', os.getpid(), flush=True); time.sleep(0.1)\nprint('x\\n' * {2_000})"
    with started(tmp_path, long=waits) as process:
        named(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 0
    stages = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["status"] for stage in stages] == [0, 0]


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine(tmp_path: Path) -> None:
    """What CI runs, in the few minutes that its fast lane takes."""
    command = [sys.executable, "-m", "qwen2_npu.cli", "nightly", "--quick", "--results", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {"run.json", "index.html", "summary.md", "doctor.zip"} <= {path.name for path in tmp_path.iterdir()}
