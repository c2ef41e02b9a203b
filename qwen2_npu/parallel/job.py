"""A job of several ranks on this server, started by DeepSpeed's launcher: its command, and why it failed.

Whoever starts it keeps an eye on it (``conformance/children.py``); what its ranks do to each other is
``launch.joined``'s affair.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence

ERROR = "error: "
"""How the line begins in which a rank says why the job failed."""

LAUNCHER = ("-m", "deepspeed.launcher.runner", "--log_level", "error", "--hostfile", os.devnull)
"""As Python's arguments. Every rank gets ``--local_rank=N`` before its own. Without a file of hosts, whatever there is
in DeepSpeed's default place, it is this server."""

KILLED = re.compile(r"'--local_rank=(\d+)'.*exits with return code = -(\d+)")
"""What the launcher says of a rank that a signal has ended, where it is the first to notice."""


def why_not(device: str, ranks: int, cards: int) -> str | None:
    """Why a job of so many ranks cannot be started here; None where it can.

    Args:
        device: as torch names it.
        cards: of this kind on this server; a CPU takes any number of ranks.
    """
    kind, colon, _ = device.partition(":")
    if colon:
        return f"needs {ranks} cards: {device} is one; leave the number out"
    if kind != "cpu" and cards < ranks:
        return f"needs {ranks} cards of this kind: {kind} has {cards}"
    if not is_installed():
        return f'needs DeepSpeed, which starts {ranks} ranks and is not installed: pip install -e ".[deepspeed]"'
    return None


def is_installed() -> bool:
    """Whether DeepSpeed is; nothing is imported."""
    return importlib.util.find_spec("deepspeed") is not None


def command(module: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """What runs ``module``, with ``arguments``, once per card."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that no other job has
        port = server.getsockname()[1]
    job = ["--num_gpus", str(ranks), "--master_port", str(port), "--module", module, *arguments]
    return [sys.executable, *LAUNCHER, *job]


def environment(device: str) -> dict[str, str]:
    """This process's, and what DeepSpeed needs to know: it takes an NPU wherever torch_npu is installed."""
    return {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "DS_ACCELERATOR": device.partition(":")[0]}


def cause(output: Sequence[str], status: int | None, seconds: float) -> str:
    """The one line that says why a job failed.

    Args:
        output: of the launcher and the ranks.
        status: None where the job took longer than ``seconds`` and was ended.
    """
    said = [line.removeprefix(ERROR) for line in output if line.startswith(ERROR)]
    if said:
        return said[0]
    if killed := next(filter(None, map(KILLED.search, output)), None):
        name = signal.Signals(int(killed[2])).name
        return f"rank {killed[1]} was killed by {name}, perhaps for want of memory (see dmesg)"
    if status is None:
        return f"the ranks did not end within {seconds:g} s"
    last = next((line for line in reversed(output) if line.strip()), "no output")
    return f"the ranks ended with status {status} and without a result: {last.strip()}"
