"""The gate's negative controls: pytest in a subprocess, everything that would stay green seen to fail, with its
message.

Each test runs the committed tests/perf/test_latency.py with a stand-in for the machine (tests/perf/fake_runner.py).
Failures are read from JUnit: that is what a nightly job looks at.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.perf import benchmark_json, documented
from qwen2_npu.conformance.perf.documented import BASELINES
from tests.perf.subprocesses import LATENCY, REPOSITORY, run_pytest

EVERY_ROW = {f"test_latency[{number.row.id}]" for number in documented.read()}
FEW = "--gate-rows=7b-batch-*"
LAST = "every_row_was_judged"
ROW = "7b-ladder-b4-graph-add_rms_norm-decode"


# ---- the self-test -------------------------------------------------------------------------------------------------
def test_every_row_passes_at_its_documented_latency(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate")
    assert result.status == 0, result.output
    assert (result.failed, result.passed) == ({}, len(EVERY_ROW) + 1)
    assert "SELF-TEST: latencies were injected" in result.output
    assert "compared with documented on Atlas 800I A2, SKU unknown" in result.output
    assert "76 rows, 76 passed" in result.output


@pytest.mark.parametrize(
    "fake_runner", [{"limit": True, "past": 1e-6}, {"factor": 1.2}], ids=["past_the_limit", "+20%"]
)
def test_every_row_fails_past_its_margin_and_is_named(fake_runner: dict[str, Any], tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate", fake_runner=fake_runner)
    assert result.status == 1
    assert set(result.failed) == EVERY_ROW
    for number in documented.read():
        message = result.failed[f"test_latency[{number.row.id}]"]
        assert f"SELF-TEST, injected latencies: row {number.row.id} ({number.label})" in message
        assert f"against {number.ms:.4g} ms documented on Atlas 800I A2" in message
        assert "slower: mean" in message


def test_one_slow_row_is_one_failure_with_and_without_the_gate(tmp_path: Path) -> None:
    for arguments in (["--gate"], []):
        result = run_pytest(tmp_path, *arguments, fake_runner={"rows": {ROW: 1.2}})
        assert result.status == 1
        assert set(result.failed) == {f"test_latency[{ROW}]"}
        assert f"FAILED {ROW}: slower: mean 28.8 ms against 24 ms" in result.output


# ---- what stays green in silence ----------------------------------------------------------------------------------
SELECTIONS = {
    "-k": ("-k", "prefill"),
    "-k_nothing": ("-k", "no_such_test"),
    "--deselect": ("--deselect", f"{LATENCY}::test_latency[7b-batch-b1-graph-fused_qkv-decode]"),
    "-m": ("-m", "not perf"),
}


@pytest.mark.parametrize("arguments", SELECTIONS.values(), ids=SELECTIONS)
def test_rows_left_out_fail(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate", FEW, *arguments)
    assert result.status == 1
    assert set(result.failed) == {LAST}
    assert (
        "rows have a baseline and no test ran for them: deselected, renamed, or another rootdir" in result.failed[LAST]
    )


def test_another_file_alone_fails(tmp_path: Path) -> None:
    other = tmp_path / "test_other.py"
    other.write_text("def test_other(): pass\n")
    result = run_pytest(tmp_path, "--gate", tests=str(other))
    assert result.status == 1
    assert "76 rows have a baseline and no test ran for them" in result.failed[LAST]


def test_another_rootdir_fails(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate", "--rootdir=tests", FEW)
    assert result.status == 1
    assert len(result.failed) == 13
    assert "run with another rootdir" in next(iter(result.failed.values()))


def test_a_renamed_test_fails(tmp_path: Path) -> None:
    copy = tmp_path / LATENCY
    copy.parent.mkdir(parents=True)
    copy.write_text(Path(LATENCY).read_text().replace("def test_latency(", "def test_speed("))
    result = run_pytest(tmp_path, "--gate", FEW, folder=tmp_path)
    assert result.status == 1
    assert len(result.failed) == 13
    message = result.failed["test_speed[7b-batch-b1-graph-fused_qkv-decode]"]
    assert f"its baselines are kept under {LATENCY}::test_latency[7b-batch-b1-graph-fused_qkv-decode]" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark-skip"], "--benchmark-skip"),
        (["--benchmark-disable"], "benchmarks are disabled: drop --benchmark-disable"),
        (["-n", "2"], "xdist is active"),
    ],
    ids=["skip", "disable", "xdist"],
)
def test_switched_off_benchmarks_fail_every_row(arguments: list[str], message: str, tmp_path: Path) -> None:
    plugins = ("xdist.plugin",) if "-n" in arguments else ()
    result = run_pytest(tmp_path, "--gate", *arguments, plugins=plugins)
    assert result.status == 1
    assert set(result.failed) == EVERY_ROW | {LAST}
    assert message in result.failed[f"test_latency[{ROW}]"]


def test_all_rows_skipped_fails(tmp_path: Path) -> None:
    reason = "needs 8 cards of this kind: npu has 2"
    lenient = run_pytest(tmp_path, fake_runner={"why_not": reason})
    assert (lenient.status, lenient.skipped) == (0, 76)
    assert f"not run: 76 rows: {reason}" in lenient.output
    result = run_pytest(tmp_path, "--gate", fake_runner={"why_not": reason})
    assert result.status == 1
    assert set(result.failed) == EVERY_ROW | {LAST}
    assert f"76 rows not run: {reason}" in result.failed[LAST]


@pytest.mark.parametrize("arguments", [[], ["--gate"]], ids=["lenient", "gate"])
def test_ranks_that_fail_are_the_message_of_their_rows(arguments: list[str], tmp_path: Path) -> None:
    cause = "72B on 8 cards, batch 4, graph, fused_qkv: rank 3 ended without a word: killed"
    scope = "--gate-rows=72b-ladder-b4-graph-fused_qkv-*"
    result = run_pytest(tmp_path, *arguments, scope, fake_runner={"job_fails": cause})
    assert result.status == 1
    rows = {f"72b-ladder-b4-graph-fused_qkv-{phase}" for phase in ("prefill", "decode")}
    assert {f"test_latency[{row}]" for row in rows} == result.failed.keys() - {LAST}
    for row in rows:
        assert result.failed[f"test_latency[{row}]"].startswith(f"Failed: row {row}: {cause}\n")
    assert "Traceback" not in result.output


def test_any_skipped_or_excused_test_fails(tmp_path: Path) -> None:
    other = tmp_path / "test_other.py"
    other.write_text(
        "import pytest\n"
        "def test_skipped(): pytest.skip('no time')\n"
        "@pytest.mark.xfail(reason='known')\ndef test_excused(): assert 0\n"
    )
    result = run_pytest(tmp_path, "--gate", str(other))
    assert result.status == 1
    assert set(result.failed) == {"test_skipped", "test_excused"}
    assert "no time" in result.failed["test_skipped"]


@pytest.mark.parametrize("flag", ["--collect-only", "--setup-only", "--setup-plan"])
def test_a_gate_that_runs_nothing_is_refused(flag: str, tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate", flag)
    assert result.status == 4
    assert "runs no test" in result.output


@pytest.mark.parametrize(
    ("scope", "wrong"),
    [("8b-*", "8b-*"), ("7b-batch-*,7b-lader-*", "7b-lader-*"), ("7b-*, ", "")],
    ids=["nothing", "one_of_two_mistyped", "trailing_comma"],
)
@pytest.mark.parametrize("gate", [["--gate"], []], ids=["gate", "lenient"])
def test_a_pattern_that_matches_no_row_is_refused(scope: str, wrong: str, gate: list[str], tmp_path: Path) -> None:
    result = run_pytest(tmp_path, *gate, f"--gate-rows={scope}")
    assert result.status == 4
    assert f"--gate-rows={wrong} matches none of 76 rows" in result.output
    assert "Traceback" not in result.output


def test_fewer_than_one_decode_step_is_refused() -> None:
    """By the root conftest.py, which run_pytest goes without; other values in tests/unit/test_pytest_options.py."""
    command = [sys.executable, "-m", "pytest", LATENCY, "--decode-steps=0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    said = "ERROR: --decode-steps 0: must be a positive integer, at most 1000000"
    assert (done.returncode, done.stderr.strip()) == (4, said)


def test_a_declared_scope_is_said(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate", "--gate-rows=7b-*")
    assert (result.status, result.passed) == (0, 37)
    assert "outside of --gate-rows=7b-*: 40 rows, neither run nor gated" in result.output


# ---- baselines ----------------------------------------------------------------------------------------------------
def copied_baselines(tmp_path: Path) -> Path:
    folder = tmp_path / "baselines"
    folder.mkdir()
    for name in (documented.SOURCE, benchmark_json.FILE):
        shutil.copy(BASELINES / name, folder)
    return folder


@pytest.mark.parametrize("value", [0, 1, -24])
def test_a_placeholder_in_the_source_fails(value: int, tmp_path: Path) -> None:
    folder = copied_baselines(tmp_path)
    source = folder / documented.SOURCE
    source.write_text(source.read_text(encoding="utf-8").replace("[94, 23]", f"[94, {value}]"), encoding="utf-8")
    result = run_pytest(tmp_path, "--gate", fake_runner={"baselines": str(folder)})
    assert result.status != 0
    assert f"table 7b-batch, row batch size 1: {value} ms is a placeholder" in result.output


def test_a_row_dropped_from_the_source_fails(tmp_path: Path) -> None:
    folder = copied_baselines(tmp_path)
    source = folder / documented.SOURCE
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if "[94, 23]" not in line]
    source.write_text("\n".join(lines), encoding="utf-8")
    result = run_pytest(tmp_path, "--gate", fake_runner={"baselines": str(folder)})
    assert result.status != 0
    assert "holds 74 numbers and declares 76" in result.output


def test_an_edited_benchmark_file_fails(tmp_path: Path) -> None:
    folder = copied_baselines(tmp_path)
    path = folder / benchmark_json.FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content["benchmarks"][0]["stats"]["mean"] = 0
    path.write_text(json.dumps(content), encoding="utf-8")
    result = run_pytest(tmp_path, "--gate", fake_runner={"baselines": str(folder)})
    assert set(result.failed) == {LAST}
    assert (
        "does not agree with the documented numbers in rows 7b-ladder-b4-eager-original-prefill" in result.failed[LAST]
    )


def test_a_row_without_a_baseline_fails(tmp_path: Path) -> None:
    """The stock model of transformers 5.x is not what was documented; this machine has recorded nothing for it."""
    other = {"identity": {"transformers": "5.23.0"}}
    lenient = run_pytest(tmp_path, fake_runner=other)
    assert lenient.status == 0
    assert "compared with nothing: 8 rows" in lenient.output
    result = run_pytest(tmp_path, "--gate", fake_runner=other)
    assert len(result.failed) == 8
    message = result.failed["test_latency[7b-ladder-b4-eager-original-decode]"]
    assert "no baseline to compare with" in message
    assert "shown as stock-5.x: the documented 52 ms are of the model of transformers 4.37.0" in message


SHORTER = {"asked_steps": 64, "decode_ms": [1e3] * 64, "contexts": [0, *range(1024, 1088)]}


# ---- measurements that are none -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fake_runner", "message"),
    [
        ({"changes": {"asked_steps": 2000}}, "1023 decode steps of 2000 asked for"),
        ({"changes": SHORTER}, "a shorter context is less work"),
        ({"changes": {"warnings": ["frequency governor powersave"]}}, "host: frequency governor powersave"),
        ({"changes": {"contexts": [0] + [1024] * 1023}}, "the KV cache does not grow by one token per step"),
        ({"factor": 0.1}, "is below the physical floor of"),
        ({"changes": {"wall_ms": [0.01] * 1024}}, "a synchronize is missing"),
        ({"identity": {"soc": "Ascend910B9"}}, "nothing is known of Ascend910B9"),
    ],
    ids=["fewer_steps", "shorter_run", "host", "kv_not_growing", "below_the_floor", "no_synchronize", "unknown_card"],
)
def test_a_measurement_that_is_none_fails(fake_runner: dict[str, Any], message: str, tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--gate", "--gate-rows=7b-batch-b1-graph-fused_qkv-decode", fake_runner=fake_runner)
    assert result.status == 1
    assert message in result.failed["test_latency[7b-batch-b1-graph-fused_qkv-decode]"]


@pytest.mark.parametrize(
    ("peak", "message"),
    [(None, "the device did not say"), (10**9, "is below 15,"), (10**11, "is above")],
    ids=["unmeasured", "too_little", "too_much"],
)
def test_memory_that_is_not_the_formulas_fails(peak: int | None, message: str, tmp_path: Path) -> None:
    fake_runner = {"changes": {"peak_bytes": peak}}
    result = run_pytest(tmp_path, "--gate", "--gate-rows=7b-batch-b1-*", fake_runner=fake_runner)
    assert set(result.failed) == {"test_latency[7b-batch-b1-graph-fused_qkv-prefill]"}
    assert f"memory: {'' if peak is None else 'peak '}" in next(iter(result.failed.values()))
    assert message in next(iter(result.failed.values()))


@pytest.mark.parametrize(
    "identity",
    [
        {"verified": "emulated (torch_npu 2.13.0, torchair)"},
        {"device": "cpu", "verified": "cpu (portable kernels)"},
    ],
    ids=["emulated", "cpu"],
)
def test_another_machine_is_compared_with_nothing(identity: dict[str, str], tmp_path: Path) -> None:
    lenient = run_pytest(tmp_path, fake_runner={"identity": identity})
    assert (lenient.status, lenient.skipped) == (0, 76)
    assert "not run: 76 rows: not comparable: needs an Atlas 800I A2" in lenient.output
    assert "compared with" not in lenient.output
    result = run_pytest(tmp_path, "--gate", fake_runner={"identity": identity})
    assert set(result.failed) == EVERY_ROW | {LAST}
