"""Programs from outside this project, unchanged, on emulated cards and on the CPU."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu import emulator

SCRIPTS = Path(__file__).parent / "scripts"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None or not emulator.is_active(), reason="there are no emulated cards here"
)


def start(script: str, device: str, *arguments: str) -> subprocess.Popen[str]:
    """A script under ``qwen2-npu emulate``, with ``device`` as its first argument."""
    command = [sys.executable, "-m", "qwen2_npu.cli", "emulate", "--", sys.executable, str(SCRIPTS / script), device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_here(script: str, device: str, *arguments: str) -> None:
    gc.collect()  # scripts read memory statistics: what other tests have left must not be freed meanwhile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, device, *arguments])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def on_both(script: str, folder: Path, *arguments: str, here: bool = False) -> tuple[dict, dict]:
    """What the script wrote on the NPU, in a process under ``emulate``, and on the CPU, in this one.

    Args:
        here: on the NPU in this process, too, which is emulated as well.
    """
    if here:
        run_here(script, "npu", *arguments, str(folder / "npu.json"))
        run_here(script, "cpu", *arguments, str(folder / "cpu.json"))
    else:
        running = start(script, "npu", *arguments, str(folder / "npu.json"))
        run_here(script, "cpu", *arguments, str(folder / "cpu.json"))
        said, _ = running.communicate(timeout=300)
        assert running.returncode == 0, said[-4000:]
    npu, cpu = (json.loads((folder / f"{device}.json").read_text()) for device in ("npu", "cpu"))
    return npu, cpu


def test_scripts_import_nothing_of_this_project():
    for path in SCRIPTS.glob("*.py"):
        assert "qwen2_npu" not in path.read_text(), path


# A process of its own takes seconds to start. In the fast lane test_collectives starts some under emulate.
@pytest.mark.parametrize("here", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_tour_of_torch_npu(here, tmp_path):
    npu, cpu = on_both("torch_npu_tour.py", tmp_path, here=here)
    assert npu.keys() == cpu.keys()
    for part, expected in cpu.items():
        assert npu[part] == (expected if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-5)), part


@pytest.mark.slow
def test_the_stock_model_generates_the_cpu_s_tokens(tmp_path):
    from qwen2_npu.conformance import tiny

    npu, cpu = on_both("stock_qwen2.py", tmp_path, str(tiny.path()))
    assert npu == cpu
    assert npu.keys() == {"eager", "sdpa"}
    assert all(len(set(map(tuple, rows))) == 2 for rows in npu.values())
