"""Two real processes that share a model, one launch per device: what they check is in parallel_ranks.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu.optimizations import MODES_OF
from tests.accuracy import parallel_ranks
from tests.accuracy.parallel_faults import PARALLEL_FAULTS

ROOT = Path(__file__).parents[2]
RANKS = 2


def launch(device: str, folder: Path) -> list[dict[str, str]]:
    """What each rank found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", parallel_ranks.__name__, device, str(folder)]
    if device == "npu":
        command = [sys.executable, "-m", "qwen2_npu.cli", "emulate", "--", *command]
    done = subprocess.run(
        command,
        cwd=ROOT,
        # The launcher itself needs no torch_npu; ranks on an NPU import it.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    files = [folder / f"{rank}.json" for rank in range(RANKS)]
    assert all(file.exists() for file in files), f"status {done.returncode}\n{done.stdout[-4000:]}"
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_two_processes(device: str, tmp_path: Path) -> None:
    """The same tokens as one in every mode; AutoTP's stock model; on an NPU the faults in GE graphs."""
    if device == "npu" and importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    found = launch(device, tmp_path)
    failed = [f"rank {rank}, {name}: {said}" for rank, each in enumerate(found) for name, said in each.items() if said]
    assert not failed, "\n".join(failed)
    expected = len(MODES_OF[device]) + 3 + (importlib.util.find_spec("deepspeed") is not None)
    if device == "npu":
        expected += 2 + sum(fault.ranks == RANKS for fault in PARALLEL_FAULTS)
    assert [len(each) for each in found] == [expected] * RANKS
