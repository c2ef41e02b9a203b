"""Every stage is run and judged, whatever the others do; the engine is tested with small programs as stages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.report import nightly
from qwen2_npu.conformance.report.nightly import NightlyOptions, Stage, stages
from qwen2_npu.optimizations import LADDER

EMULATED = "emulated (torch_npu)"


def python(name: str, code: str, *makes: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), makes)


def run(results: Path, *plan: Stage, minutes: float = 1.0) -> tuple[list[Stage], list[str]]:
    provenance = json.dumps({"verified": EMULATED, "commit": "a" * 40})
    machine = python("machine", f"open({str(results / nightly.MACHINE)!r}, 'w').write({provenance!r})", nightly.MACHINE)
    lines: list[str] = []
    results.mkdir(exist_ok=True)
    done = nightly.run(
        NightlyOptions(results, minutes=minutes), lines.append, lambda options, where: plan, lambda _: machine
    )
    return done, lines


def of_run(results: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    content = json.loads((results / "run.json").read_text(encoding="utf-8"))
    assert content["provenance"]["verified"] == EMULATED
    return {stage["name"]: stage for stage in content["stages"]}


def test_a_failure_stops_nothing_and_is_explained(tmp_path: Path) -> None:
    done, lines = run(
        tmp_path,
        python("bad", "print('reason 42'); raise SystemExit(3)"),
        python("no file", "pass", "promised.xml"),
        python("good", "print('fine')"),
    )
    assert [stage.status for stage in done] == [0, 3, 1, 0]
    found = of_run(tmp_path)
    assert found["bad"]["problem"].startswith("reason 42 (see logs/bad.log)")
    assert found["no file"]["problem"] == "ended well and did not make promised.xml"
    assert "fine" in lines
    assert (tmp_path / "logs" / "bad.log").read_text(encoding="utf-8") == "reason 42\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open({!r}, 'w').write('{{\"verified\": \"npu (CANN 8.2)\"}}')", Where.NPU),
        ("raise SystemExit(1)", Where.NOT_SAID),
    ],
)
def test_what_is_run_follows_from_what_the_machine_s_stage_found(tmp_path: Path, code: str, expected: Where) -> None:
    machine = python("machine", code.format(str(tmp_path / nightly.MACHINE)))
    asked: list[Where] = []

    def plan(options: NightlyOptions, where: Where) -> list[Stage]:
        asked.append(where)
        return []

    nightly.run(NightlyOptions(tmp_path), lambda line: None, plan, lambda _: machine)
    assert asked == [nightly.LONGEST, expected]


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    done, _ = run(tmp_path, python("hangs", child), python("good", "pass"), minutes=0.008)
    assert [stage.status for stage in done] == [0, nightly.TIMED_OUT, 0]
    assert "took longer than" in done[1].problem


def test_a_run_that_is_killed_leaves_what_was_found_before(tmp_path: Path) -> None:
    look = f"import json; print([s['status'] for s in json.load(open({str(tmp_path / 'run.json')!r}))['stages']])"
    _, lines = run(tmp_path, python("bad", "exit(3)"), python("looks", look), python("later", "pass"))
    assert "[0, 3, None, None]" in lines


def test_an_interrupt_ends_the_stage_and_leaves_the_rest_unrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nightly._run

    def interrupted(stage: Stage, options: NightlyOptions, say: nightly.Callable[[str], None]) -> bool:
        if stage.name != "long":
            return real(stage, options, say)

        def press(line: str) -> None:
            if line == "started":
                raise KeyboardInterrupt

        return real(stage, options, press)

    monkeypatch.setattr(nightly, "_run", interrupted)
    long = python("long", "import time; print('started', flush=True); time.sleep(60)")
    done, _ = run(tmp_path, long, python("later", "pass"))
    assert [stage.status for stage in done] == [0, 130, None]
    assert of_run(tmp_path)["later"]["status"] is None


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    done, _ = run(tmp_path, Stage("none", ("/no/such/program",)))
    assert done[1].status == 127


def test_files_of_an_earlier_run_cannot_speak_for_this_one(tmp_path: Path) -> None:
    """They are removed before the first stage; what the earlier run did not make stays."""
    made = ["verify.json", "graph.xml", "benchmark.json", "doctor.zip"]
    code = f"import os; os.chdir({str(tmp_path)!r}); [open(name, 'w').write('old') for name in {made!r}]"
    run(tmp_path, python("old", code, *made))
    assert all((tmp_path / name).exists() for name in (*made, "logs/old.log"))
    (tmp_path / "history").mkdir()
    for name in ("history/a.json", "mine.txt", "logs/app.log"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    run(tmp_path, python("new", "pass"))
    assert not any((tmp_path / name).exists() for name in (*made, "logs/old.log"))
    for name in ("history/a.json", "mine.txt", "logs/app.log"):
        assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["pom.xml", "bench.json", "index.html", "doctor.zip", "logs/doctor.log"])
def test_no_stage_runs_where_a_foreign_file_would_be_lost_or_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / name).write_text("mine", encoding="utf-8")
    ran: list[str] = []
    with pytest.raises(ValueError, match=rf"no nightly run made, .*: {name};"):
        nightly.run(NightlyOptions(tmp_path), ran.append)
    assert not ran
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Not even one that appears while the run lasts."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    results = tmp_path / "report"
    link = python("link", f"import os; os.symlink({str(mine)!r}, {str(results / 'logs' / 'late.log')!r})")
    done, _ = run(results, link, python("late", "print('x')"))
    assert [stage.status for stage in done] == [0, 0, 1]
    assert str(results / "logs" / "late.log") in done[2].problem
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_stage_ends_when_the_caller_fails(tmp_path: Path) -> None:
    """What is wrong with the output must not leave the stage running."""

    def broken(line: str) -> None:
        if line.isdecimal():
            pids.append(int(line))
            raise RuntimeError("no terminal")

    pids: list[int] = []
    stage = python("s", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with pytest.raises(RuntimeError, match="no terminal"):
        nightly.run(NightlyOptions(tmp_path), broken, lambda options, where: [], lambda _: stage)
    assert not psutil.pid_exists(pids[0])


FULL_DISK = """
import sys
from pathlib import Path
from qwen2_npu.conformance.report import nightly
from qwen2_npu.conformance.report.nightly import NightlyOptions, Stage

folder = Path(sys.argv[1])
stages = [
    Stage("talks", (sys.executable, "-c", "for i in range(4000): print('line', i, 'x' * 40)")),
    Stage("good", (sys.executable, "-c", "print('fine')")),
]
done = nightly.run(NightlyOptions(folder), print, lambda options, where: stages[1:], lambda options: stages[0])
for stage in done:
    print("STATUS", stage.name, stage.status, stage.problem.splitlines()[:1])
"""


def test_a_disk_that_fills_up_loses_no_verdict(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=64k none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(disk), sys.executable, FULL_DISK],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("a file system cannot be mounted on this machine")
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 3)[1::2] for line in done.stdout.splitlines() if line.startswith("STATUS"))
    why = "cannot be written (No space left on device): free space on its disk, or name another"
    assert f"{disk}/logs/talks.log {why}" in found["talks"]
    assert f"{disk}/logs/good.log {why}" in found["good"]
    assert f"{disk}/run.json {why}" in found["run.json"]
    assert "line 3999 " in done.stdout, "the stage went on"
    assert "STATUS talks 1 " in done.stdout


# ---- what is run ----------------------------------------------------------------------------------------------------
def commands(where: Where, **changes: object) -> dict[str, str]:
    found: Sequence[Stage] = stages(NightlyOptions(Path("/r"), **changes), where)  # type: ignore[arg-type]
    return {stage.name: " ".join(stage.command[1:]) for stage in found}


def test_latency_is_gated_on_a_real_npu_alone() -> None:
    for quick in (False, True):
        assert "--gate --gate-rows 7b-*" in commands(Where.NPU, gate_rows="7b-*", quick=quick)["perf"]
    for where in set(Where) - {Where.NPU}:
        assert "--gate" not in commands(where)["perf"]


def test_every_suite_and_what_it_leaves() -> None:
    found = stages(NightlyOptions(Path("/r")), Where.NPU)
    assert [stage.name for stage in found] == ["doctor", "verify eager", "verify torchair", "accuracy", "graph", "perf"]
    assert [stage.makes for stage in found[3:]] == [("accuracy.xml",), ("graph.xml",), ("perf.xml",)]
    assert "verify torchair" not in commands(Where.CPU)
    assert not any("slow" in command for command in commands(Where.NPU).values())


def test_the_documentation_names_every_file() -> None:
    text = (nightly.ROOT / "docs" / "nightly.md").read_text(encoding="utf-8")
    table = text.split("| stage | file |")[1].split("\n\n")[0]
    documented = {name for row in table.splitlines()[2:] for name in re.findall("`([^`]+)`", row.split("|")[2])}
    options = NightlyOptions(Path("/r"))
    made = set(nightly.names([nightly.machine_stage(options), *stages(options, Where.NPU)]))
    assert documented == {name for name in made if not name.startswith("logs/")} | {"logs/*.log", "history/*.json"}


def test_quick_is_the_fast_lane() -> None:
    found = commands(Where.EMULATED, quick=True)
    for suite in ("accuracy", "graph", "perf"):
        assert "-m not slow" in found[suite]
    assert found["verify torchair"].endswith(f"--steps {LADDER[-1]}")
    assert "--steps" not in found["verify eager"]


def test_a_checkpoint_is_verified_compared_and_timed() -> None:
    found = commands(Where.NPU, model_path=Path("/model"))
    with_model = [name for name, command in found.items() if "--model-path /model" in command]
    assert with_model == ["verify eager", "verify torchair", "accuracy", "perf"]


def test_device_and_workers_are_handed_on() -> None:
    found = commands(Where.CPU, device="cpu", workers=4)
    assert all("--device cpu" in command for command in found.values())
    assert "-n 4" in found["accuracy"]
    assert "-n" not in found["perf"].split(), "times of parallel tests mean nothing"
