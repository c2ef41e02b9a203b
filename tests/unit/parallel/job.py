"""A job of several ranks under a launcher, for tests: its script, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import qwen2_npu
from qwen2_npu import emulator

ROOT = Path(qwen2_npu.__file__).parents[1]

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--log_level", "error", "--num_gpus"],
}

NO_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
BOTH = ["torchrun", pytest.param("deepspeed", marks=NO_DEEPSPEED)]

SCRIPT = """
import os, signal, subprocess, sys, time
import qwen2_npu
from qwen2_npu.parallel.launch import joined

what, who = sys.argv[-2], int(sys.argv[-1])
with joined(os.environ["TEST_DEVICE"]) as group:
    import torch, torch.distributed as dist
    numbers = torch.full((2,), group.rank + 1.0, device=group.device)
    dist.all_reduce(numbers)
    if group.rank == 0:
        print(numbers.tolist(), group.device, flush=True)
    if group.rank == who:
        subprocess.Popen(["sleep", "1000"])
        open(os.environ["TEST_SINCE"], "w").write(str(time.time()))
        if what == "raises":
            raise ValueError("this is the cause")
        if what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "hangs":
            time.sleep(1000)
        if what == "kills its launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        if what == "ends":
            sys.exit(3)
    if what != "works":
        dist.all_reduce(numbers)
"""


@dataclass
class Done:
    """``took``: seconds from the failure to the end. ``left``: processes that were still there then."""

    status: int
    output: str
    errors: str
    took: float
    left: list[str]

    def lines(self, text: str) -> list[str]:
        """Of the ranks' errors, those with ``text``; torchrun's summary of them begins with spaces."""
        return [line for line in self.errors.splitlines() if text in line and not line.startswith(" ")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def of_job(mark: str) -> list[psutil.Process]:
    """All processes that were started with ``mark`` in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run(
    launcher: str, arguments: list[str], tmp_path: Path, *, ranks: int = 2, device: str = "cpu", timeout: int = 3,
    cards: int = 2, port: int | None = None,
) -> Done:  # fmt: skip
    """``arguments``: ``-m MODULE …`` or a script with its own. ``timeout``: what the ranks take for too long."""
    mark, since = uuid.uuid4().hex, tmp_path / "since"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TEST_MARK": mark}
    environment |= {"QWEN2_NPU_TIMEOUT": str(timeout), "TEST_DEVICE": device, "TEST_SINCE": str(since)}
    if launcher == "deepspeed" and arguments[0] == "-m":
        arguments = ["--module", *arguments[1:]]
    start = [sys.executable, *LAUNCHERS[launcher], str(ranks), "--master_port", str(port or free_port()), *arguments]
    if device == "npu":
        start = [sys.executable, "-m", "qwen2_npu.emulator", "--device-count", str(cards), *start[1:]]
    else:
        environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "DS_ACCELERATOR": "cpu"}
        environment.pop("QWEN2_NPU_EMULATOR", None)
    begin = time.time()
    files = [(tmp_path / name).open("w+") for name in ("output", "errors")]
    try:
        # To files: a process that is left behind would hold a pipe open.
        done = subprocess.run(start, env=environment, stdout=files[0], stderr=files[1], timeout=120)
        until = time.time() + 5
        while (left := of_job(mark)) and time.time() < until:
            time.sleep(0.05)
        end = time.time()
        found = Done(
            done.returncode,
            (tmp_path / "output").read_text(),
            (tmp_path / "errors").read_text(),
            end - (float(since.read_text()) if since.exists() else begin),
            [" ".join(process.cmdline()) for process in left],
        )
        print(launcher, device, *arguments[-2:], f"status {found.status}, {found.took:.1f} s")
        return found
    finally:
        for process in of_job(mark):
            process.kill()
        for file in files:
            file.close()


def script(tmp_path: Path) -> str:
    path = tmp_path / "rank.py"
    path.write_text(SCRIPT)
    return str(path)


NO_NPU = pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
