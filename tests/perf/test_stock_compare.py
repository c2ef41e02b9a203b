"""Stock ``--benchmark-compare`` and ``pytest-benchmark compare`` on the documented file, and the traps "
"closed around them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu.conformance.perf import benchmark_json
from qwen2_npu.conformance.perf.documented import BASELINES
from tests.perf.subprocesses import Result, run_pytest

TWO_ROWS = "--gate-rows=7b-batch-b1-*"
ROW = "7b-batch-b1-graph-fused_qkv-decode"


def test_a_bare_compare_reads_the_documented_tables(tmp_path: Path) -> None:
    """Stock comparison has no 10 % of its own: it fails where it is told to."""
    result = run_pytest(tmp_path, TWO_ROWS, "--benchmark-compare", "--benchmark-verbose", fake_runner={"factor": 1.05})
    assert result.status == 0, result.output
    assert f"Comparing against benchmarks from: {benchmark_json.FILE}" in result.output
    for column in ("0001_docum", "NOW"):
        assert f"test_latency[{ROW}] ({column}" in result.output
    failing = run_pytest(
        tmp_path, TWO_ROWS, "--benchmark-compare", "--benchmark-compare-fail=mean:1%", fake_runner={"factor": 1.05}
    )
    assert failing.status == 1
    assert "Performance has regressed" in failing.output
    assert "2 rows, 2 passed" in failing.output  # the gate's own summary is there all the same


def test_the_compare_command_reads_the_documented_tables(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest_benchmark",
        "--storage",
        str(BASELINES),
        "compare",
        "--columns=mean,rounds",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "benchmark '7B decode': 18 tests" in done.stdout
    assert done.stdout.count("test_latency[") == 76


def test_on_another_machine_nothing_is_compared(tmp_path: Path) -> None:
    here = {"identity": {"device": "cpu", "verified": "cpu (portable kernels)"}}
    result = run_pytest(tmp_path, "--benchmark-compare", fake_runner=here)
    assert (result.status, result.skipped) == (0, 76)
    for extra in ("--gate", "--benchmark-compare-fail=mean:10%"):
        refused = run_pytest(tmp_path, "--benchmark-compare", extra, fake_runner=here)
        assert refused.status != 0
        assert "documented tables: not comparable: needs an Atlas 800I A2" in refused.output


def test_the_stock_model_of_another_transformers_is_compared_with_nothing(tmp_path: Path) -> None:
    """``original`` is half again as slow as documented, which only 4.37's may not be."""
    original, ours = (f"7b-ladder-b4-eager-{step}-decode" for step in ("original", "fused_qkv"))
    arguments = (f"--gate-rows={original},{ours}", "--benchmark-compare", "--benchmark-compare-fail=mean:10%")

    def compared(factor: float, transformers: str) -> Result:
        fake_runner = {"rows": {original: 1.5, ours: factor}, "identity": {"transformers": transformers}}
        return run_pytest(tmp_path, *arguments, "--benchmark-verbose", fake_runner=fake_runner)

    assert f"{original}] (0001_documen) - Field 'mean' has failed" in compared(1.0, "4.37.0").output
    newer = compared(1.0, "5.24.0")
    assert (newer.status, newer.passed) == (0, 2), newer.output
    said = f"compared with nothing documented: {original}: the documented 52 ms are of the model of transformers 4.37.0"
    assert said in newer.output
    # What is this project's own stays compared.
    regressed = compared(1.105, "5.24.0").output
    assert f"{ours}] (0001_documen) - Field 'mean' has failed" in regressed
    assert f"{original}] (0001_documen)" not in regressed


def test_another_machines_file_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    made = run_pytest(tmp_path, TWO_ROWS, f"--benchmark-json={saved}")
    assert made.status == 0, made.output
    assert json.loads(saved.read_text())["self_test"] is True
    assert run_pytest(tmp_path, TWO_ROWS, f"--benchmark-compare={saved}").status == 0
    other = {"identity": {"soc": "Ascend910B3"}}
    refused = run_pytest(tmp_path, TWO_ROWS, f"--benchmark-compare={saved}", fake_runner=other)
    assert refused.status != 0
    assert "--benchmark-compare: saved on another machine (soc: Ascend910B4 → Ascend910B3)" in refused.output


def test_a_saved_run_is_a_limit_of_its_own(tmp_path: Path) -> None:
    """How docs/nightly.md bisects what got worse within its documented limit."""
    saved = tmp_path / "good.json"
    run_pytest(tmp_path, TWO_ROWS, f"--benchmark-json={saved}")
    compare = (TWO_ROWS, f"--benchmark-compare={saved}", "--benchmark-compare-fail=mean:2%")
    good = run_pytest(tmp_path, *compare, fake_runner={"factor": 1.01})
    assert good.status == 0, good.output
    bad = run_pytest(tmp_path, *compare, fake_runner={"factor": 1.03})
    assert bad.status == 1
    assert "Performance has regressed" in bad.output
    assert bad.failed == {}  # the gate's own limits are further away


@pytest.mark.parametrize("arguments", [["--benchmark-save=mine"], ["--benchmark-autosave"]], ids=["save", "autosave"])
def test_saving_never_reaches_the_documented_tables(arguments: list[str], tmp_path: Path) -> None:
    before = sorted(path.name for path in BASELINES.iterdir())
    refused = run_pytest(tmp_path, TWO_ROWS, "--benchmark-compare", *arguments)
    assert refused.status == 4
    assert "save and compare in two runs" in refused.output
    direct = run_pytest(tmp_path, TWO_ROWS, f"--benchmark-storage=file://{BASELINES}", *arguments)
    assert direct.status == 4
    assert sorted(path.name for path in BASELINES.iterdir()) == before


def test_a_newer_file_is_not_taken_for_the_documented_tables(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    shutil.copy(BASELINES / benchmark_json.FILE, storage)
    saved = storage / "0002_mine.json"
    run_pytest(tmp_path, TWO_ROWS, f"--benchmark-json={saved}", fake_runner={"factor": 5.0})
    if not saved.exists():  # a failing session saves nothing
        pytest.fail("nothing was saved: the case was not set up")
    result = run_pytest(tmp_path, TWO_ROWS, "--benchmark-compare", f"--benchmark-storage=file://{storage}")
    assert result.status != 0
    assert "a bare --benchmark-compare takes the last file by name" in result.output
