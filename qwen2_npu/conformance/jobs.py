"""A question to a job of several ranks, and its one answer: both are files in a folder that lives as long as the job.

:func:`ask` starts the job, ``parallel/job.py`` knows how. Every rank runs a module that calls :func:`answer`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qwen2_npu
from qwen2_npu.conformance import children
from qwen2_npu.conformance.files import write_json
from qwen2_npu.parallel import job
from qwen2_npu.parallel.launch import RankGroup, joined

ROOT = Path(qwen2_npu.__file__).parents[1]
"""Where the ranks run: they import the package that this process has imported."""

REQUEST, RESULT = "request.json", "result.json"


class JobError(RuntimeError):
    """A job of several ranks failed; the message is the one cause."""


@dataclass(frozen=True)
class JobOfRanks:
    """Who is asked.

    Attributes:
        module: what every rank runs; it calls :func:`answer`.
        ranks: as many as cards.
        device: as torch names it, without a number.
        seconds: the job may take.
    """

    module: str
    ranks: int
    device: str
    seconds: float


def ask(what: str, who: JobOfRanks, request: Mapping[str, Any]) -> Any:
    """Start the ranks and wait for what rank 0 says. Nothing of the job is left afterwards.

    Args:
        what: is asked for, in messages.
        request: what JSON can hold.

    Raises:
        JobError: a rank failed, or the time was over. The job's whole output is printed.
    """
    with tempfile.TemporaryDirectory(prefix="qwen2_npu-") as folder:
        write_json(Path(folder) / REQUEST, {**request, "device": who.device})
        command, environment = job.command(who.module, [folder], who.ranks), job.environment(who.device)
        status, output = children.run_to_end(command, who.seconds, cwd=ROOT, env=environment)
        result = Path(folder) / RESULT
        if status != 0 or not result.exists():
            print("\n".join(output))
            raise JobError(f"{what}: {job.cause(output, status, who.seconds)}")
        return json.loads(result.read_text(encoding="utf-8"))


def answer(work: Callable[[dict[str, Any], RankGroup], Any]) -> int:
    """Be one rank of a job that :func:`ask` has started.

    Args:
        work: called with the request, on every rank; what it returns on rank 0 is the answer.

    Returns:
        The exit status. Where it is not 0, the rank that is to blame has said why in one line.
    """
    folder = Path(sys.argv[-1])  # the launcher puts an argument of its own before it
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    try:
        with joined(request["device"]) as group:
            found = work(request, group)
            if group.rank == 0:
                write_json(folder / RESULT, found)
    except Exception as error:
        traceback.print_exc()
        print(f"{job.ERROR}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr, flush=True)
        return 1
    return 0
