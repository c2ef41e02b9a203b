"""Recorded baselines through pytest: five runs, a margin in both directions, history, and no crossing of "
"fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.recorded import Recorded
from qwen2_npu.conformance.perf.rows import user_rows
from qwen2_npu.optimizations import LADDER
from tests.perf.fake_runner import ATLAS, measurement_of
from tests.perf.subprocesses import Result, run_pytest
from tests.perf.test_fail_closed import copied_baselines

ROW = f"0.5b-user-b1-eager-{LADDER[-1]}-decode"
SCOPE = f"--gate-rows={ROW}"


class Machine:
    """A stand-in with a model of the user's own, 50 ms per step, and a folder of baselines of its own."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.folder = copied_baselines(tmp_path)
        self.identity: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}

    def run(self, *arguments: str, factor: float = 1.0) -> Result:
        fake_runner = {
            "model": "0.5B",
            "recordable": True,
            "baselines": str(self.folder),
            "factor": factor,
            "identity": self.identity,
            "changes": self.changes,
        }
        return run_pytest(self.tmp_path, SCOPE, *arguments, fake_runner=fake_runner)

    def record(self, reason: str, factors: tuple[float, ...]) -> None:
        """The last run through pytest, as a user records; those before it directly."""
        *earlier, last = factors
        store = Recorded(self.folder, Fingerprint.read(ATLAS | self.identity))
        (_, row) = user_rows("0.5B", (1,), ("eager",), (LADDER[-1],))
        assert row.id == ROW
        for factor in earlier:
            measured = measurement_of({"prefill": 100 * factor, "decode": 50 * factor}, self_test=False)
            store.record(row, measured, reason, {})
        result = self.run(f"--update-baselines={reason}", factor=last)
        assert result.status == 0, result.output
        assert f"{len(self.entry['runs'])} runs" in result.output

    @property
    def path(self) -> Path:
        return self.folder / "recorded" / Fingerprint.read(ATLAS | self.identity).name / "latency.json"

    @property
    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))["rows"][ROW]
        return entry


RUNS = (1.0, 1.004, 0.998, 1.002, 0.996)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_five_runs_make_a_gate_in_both_directions(machine: Machine) -> None:
    machine.record("first", RUNS[:4])
    unfinished = machine.run("--gate")
    assert "4 of 5 runs recorded for 'first': not compared" in unfinished.failed[f"test_latency[{ROW}]"]
    machine.record("first", RUNS[4:])
    assert machine.run("--gate", factor=1.001).status == 0
    slower = machine.run("--gate", factor=1.2)
    assert "slower: median 60 ms against 50" in slower.failed[f"test_latency[{ROW}]"]
    faster = machine.run("--gate", factor=0.8)
    assert "faster: median 40 ms" in faster.failed[f"test_latency[{ROW}]"]
    assert "update the baseline with --update-baselines=REASON" in faster.failed[f"test_latency[{ROW}]"]

    # The old baseline is kept, with both reasons.
    machine.record("faster kernel", (0.8,))
    assert machine.entry["reason"] == "faster kernel"
    (old,) = machine.entry["history"]
    assert (old["reason"], old["replaced_for"], len(old["runs"])) == ("first", "faster kernel", 5)
    assert old["runs"][0]["median"] == pytest.approx(50.0)


def test_a_copied_baseline_is_caught(machine: Machine) -> None:
    machine.record("first", RUNS)
    original = machine.path
    machine.identity = {"soc": "Ascend910B4-1"}
    nothing = machine.run("--gate")
    assert "no baseline to compare with" in nothing.failed[f"test_latency[{ROW}]"]
    assert "differs in soc: Ascend910B4 → Ascend910B4-1" in nothing.failed[f"test_latency[{ROW}]"]

    machine.path.parent.mkdir()
    shutil.copy(original, machine.path)
    copied = machine.run("--gate")
    assert "copied from another machine" in copied.failed[f"test_latency[{ROW}]"]


def test_a_refused_recording_is_a_failed_row(machine: Machine) -> None:
    machine.changes = {"warnings": ["the process may run on 4 NUMA nodes"]}
    result = machine.run("--update-baselines=first")
    message = f"{ROW} is not recorded: the process may run on 4 NUMA nodes"
    assert message in result.failed[f"test_latency[{ROW}]"]
    assert f"FAILED {ROW}: {message}" in result.output
    assert "not recorded: 1 rows, which failed as said above" in result.output
    assert "1 passed" not in result.output
    assert "During handling" not in result.output
    assert not machine.path.exists()


def test_a_row_that_fails_is_not_recorded(machine: Machine) -> None:
    machine.changes = {"asked_steps": 2000}
    result = machine.run("--update-baselines=first")
    assert "1023 decode steps of 2000 asked for" in result.failed[f"test_latency[{ROW}]"]
    assert "not recorded: 1 rows" in result.output
    assert not machine.path.exists()


def test_a_damaged_baseline_is_a_failed_row(machine: Machine) -> None:
    machine.record("first", RUNS[:1])
    machine.path.write_text("{", encoding="utf-8")
    result = machine.run()
    assert "is damaged" in result.failed[f"test_latency[{ROW}]"]
    assert f"FAILED {ROW}: {machine.path} is damaged" in result.output
    assert "During handling" not in result.output


def test_an_emulated_npu_records_nothing(machine: Machine) -> None:
    machine.identity = {"verified": "emulated (torch_npu 2.13.0, torchair)"}
    result = machine.run("--update-baselines=first")
    assert result.skipped == 1
    assert "an emulated NPU computes on the CPU" in result.output
    assert not machine.path.exists()


def test_a_self_test_records_nothing(tmp_path: Path) -> None:
    folder = copied_baselines(tmp_path)
    result = run_pytest(
        tmp_path, SCOPE, "--update-baselines=first", fake_runner={"model": "0.5B", "baselines": str(folder)}
    )
    assert "a self-test's latencies are injected and are never recorded" in result.failed[f"test_latency[{ROW}]"]
    assert not list(folder.glob("recorded/*/latency.json"))


def test_judging_and_recording_at_once_is_refused(machine: Machine) -> None:
    for arguments, message in (
        (["--gate", "--update-baselines=x"], "--gate judges and --update-baselines records"),
        (["--gate", "--update-graphs=x"], "--gate judges and --update-graphs records"),
        (["--update-baselines= "], "--update-baselines needs a reason"),
        (["--update-graphs="], "--update-graphs needs a reason"),
    ):
        result = machine.run(*arguments)
        assert result.status == 4
        assert message in result.output
