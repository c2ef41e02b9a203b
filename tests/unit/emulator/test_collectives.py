"""Collectives between emulated cards: one launch runs all checks of ``collectives/`` on two ranks, as a user would."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is not installed", allow_module_level=True)

from qwen2_npu.emulator.collectives.faults import VARIABLE
from tests.unit.emulator.collectives import ranks
from tests.unit.emulator.collectives.harness import CHECKS, SLOW

ROOT = Path(__file__).parents[3]

FAST = [name for name in CHECKS if name not in SLOW]


def launch(count: int, folder: Path, *names: str, **environment: str) -> list[dict[str, str]]:
    """What each of ``count`` ranks found: check -> "" or what went wrong."""
    command = [sys.executable, "-m", "qwen2_npu.cli", "emulate", "--", sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", str(count), "-m", ranks.__name__, str(folder), *names]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    files = [folder / f"{rank}.json" for rank in range(count)]
    assert all(file.exists() for file in files), f"status {done.returncode}\n{done.stdout[-4000:]}"
    return [json.loads(file.read_text()) for file in files]


def failures(found: list[dict[str, str]], name: str) -> str:
    """Empty where every rank passed ``name``. Ranks stop at their first failure, which is the cause of the others."""
    causes = [
        f"{check} failed on rank {rank}" for rank, results in enumerate(found) for check in results if results[check]
    ]
    missing = f"not reached: {', '.join(causes) or 'the rank ended'} before"
    said = {rank: results.get(name, missing) for rank, results in enumerate(found)}
    return "\n".join(f"rank {rank}: {text}" for rank, text in said.items() if text)


def test_a_check_that_was_not_reached_names_the_one_that_failed() -> None:
    found = [{"sum": "", "gather": "Traceback"}, {"sum": "", "gather": ""}]
    assert failures(found, "sum") == ""
    assert failures(found, "gather") == "rank 0: Traceback"
    assert failures(found, "send").splitlines() == [
        f"rank {rank}: not reached: gather failed on rank 0 before" for rank in (0, 1)
    ]
    assert failures([{"sum": ""}], "send") == "rank 0: not reached: the rank ended before"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """One launch, also where several pytest-xdist workers share the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_ranks"
    with FileLock(f"{folder}.lock"):
        done = folder / "results.json"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            # The launcher itself needs no torch_npu; the ranks import it.
            found = launch(2, folder, *FAST, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
            done.write_text(json.dumps(found))
        results: list[dict[str, str]] = json.loads(done.read_text())
        return results


@pytest.mark.slow
@pytest.mark.slow_in_ci
@pytest.mark.parametrize("name", FAST)
def test_two_ranks(two_ranks: list[dict[str, str]], name: str) -> None:
    assert not failures(two_ranks, name)


@pytest.mark.slow
def test_graphs_on_two_ranks(tmp_path: Path) -> None:
    found = launch(2, tmp_path, *sorted(SLOW))
    assert not [text for name in SLOW if (text := failures(found, name))]


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """Groups of more than one card beside one another, and sums whose order matters."""
    found = launch(4, tmp_path)
    assert not [text for name in CHECKS if (text := failures(found, name))]


@pytest.mark.slow
def test_a_fault_of_the_environment_is_seen(tmp_path: Path) -> None:
    """The variable reaches the ranks, and the check that meets the fault fails on both."""
    found = launch(2, tmp_path, "asynchronous_work", **{VARIABLE: "drop:rank=1,collective=all_reduce"})
    assert all("AssertionError" in results["asynchronous_work"] for results in found)
