"""Rows on several cards: one process per card, and the measurement that rank 0 hands back.

    launcher (this process) → agent (torch's elastic agent, a process of its own) → ranks (``worker``, one per card)

They speak through a temporary folder (``job``). Nothing in it is believed that is not of this launch, of these
arguments and of this many ranks; whatever goes wrong is one ``LaunchError`` that names the rank, and shows the end of
its log. No process is left behind. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.perf import processes
from qwen2_npu.conformance.perf.job import AGENT_LOG, FAILURES, LOGS, RESULT, Job, Status, Ticket, statuses
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.worker import STACK_SIGNAL

AGENT = "qwen2_npu.conformance.perf.agent"
WORKER = ("-m", "qwen2_npu.conformance.perf.worker")

START_SECONDS = 300.0
"""For every rank to run its first line."""

LIMIT_SECONDS = 3600.0
"""From there to the result: reading or making the weights, compiling, the warm-up and the timed generate call."""

POLL_SECONDS = 0.05
STACK_SECONDS = 1.0
ENDED_BY_AGENT = (2, 0.0)
LAST_LINES = 30


class LaunchError(RuntimeError):
    """A launch that came to no measurement.

    Attributes:
        reason: why, and by which rank; one line.
        log: the end of that rank's log; empty where no rank is at fault.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(f"{reason}: {log}" if log else reason)
        self.reason, self.log = reason, log


@dataclass(frozen=True)
class Ended:
    """A rank that did not end with 0, in the order in which the agent noticed."""

    rank: int
    exitcode: int

    def __str__(self) -> str:
        if self.exitcode >= 0:
            return f"ended with status {self.exitcode}"
        try:
            return f"was killed by {signal.Signals(-self.exitcode).name}"
        except ValueError:
            return f"was killed by signal {-self.exitcode}"


def launch(
    job: Job,
    *,
    worker: Sequence[str] = WORKER,
    limit: float = LIMIT_SECONDS,
    start: float = START_SECONDS,
    folder: Path | None = None,
) -> Measurement:
    """Measure ``job`` on as many ranks as it has cards.

    Args:
        worker: arguments of Python that make a rank; it gets the launch's folder and the agent's process id as well.
        limit: seconds from the start of all ranks to their end.
        start: seconds to that start.
        folder: where the launch's own folder is made; default: the system's for temporary files. It is removed if all
            goes well, else kept for its logs.

    Raises:
        LaunchError: there is no measurement, or none of this job.
    """
    own = Path(tempfile.mkdtemp(prefix="qwen2-npu-launch-", dir=folder))
    ticket = Ticket(uuid.uuid4().hex, job)
    ticket.write(own)
    ranks = job.configuration.cards
    command = [sys.executable, "-m", AGENT, str(own), str(os.getpid()), str(ranks), *worker]
    with (own / AGENT_LOG).open("wb") as log:
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(agent, ranks, own, start, limit)
    finally:
        if agent.poll() is None:
            processes.end(agent)
    if agent.returncode != 0:
        raise _who_failed(agent.returncode, ranks, own)
    measurement = read_result(own, ticket)
    shutil.rmtree(own, ignore_errors=True)
    return measurement


# ---- the result -----------------------------------------------------------------------------------------------------
def read_result(folder: Path, ticket: Ticket) -> Measurement:
    """What rank 0 wrote.

    Raises:
        LaunchError: nothing, damaged, or of another launch, other arguments or another number of ranks.
    """
    ranks, path = ticket.job.configuration.cards, folder / RESULT
    heading = f"{ranks} ranks ended well, but"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run, job, count = content["run"], dict(content["job"]), content["ranks"]
        measurement = Measurement.from_json(dict(content["measurement"]))
        if not all(isinstance(ms, int | float) for ms in _numbers(measurement)):
            raise TypeError("a latency that is no number")
    except FileNotFoundError:
        raise LaunchError(f"{heading} rank 0 wrote no result", _log(folder, 0)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{heading} the result {path} is damaged: {type(error).__name__}: {error}") from error
    if run != ticket.run:
        raise LaunchError(f"{heading} the result {path} is an old one, of launch {run}; this is {ticket.run}")
    if count != ranks:
        raise LaunchError(f"{heading} the result {path} is of {count} ranks")
    differing = ticket.job.differences(job)
    for name, asked, measured in (
        ("input_tokens", ticket.job.input_tokens, measurement.input_tokens),
        ("decode_steps", ticket.job.decode_steps, measurement.asked_steps),
        ("weights", ticket.job.weights, measurement.weights),
    ):
        if asked != measured:
            differing.append(f"{name}: {asked} asked, {measured} measured")
    if differing:
        raise LaunchError(f"{heading} the result {path} is of other arguments: {'; '.join(dict.fromkeys(differing))}")
    return measurement


def _numbers(measurement: Measurement) -> list[Any]:
    return [measurement.prefill_ms, *measurement.decode_ms, *measurement.wall_ms, *measurement.contexts]


# ---- what goes wrong ------------------------------------------------------------------------------------------------
def _wait(agent: subprocess.Popen[bytes], ranks: int, folder: Path, start: float, limit: float) -> None:
    """To the agent's end.

    Raises:
        LaunchError: a limit was reached first.
    """
    deadline = time.monotonic() + start
    while len(known := statuses(folder)) < ranks and agent.poll() is None:
        if time.monotonic() > deadline:
            missing = _names([rank for rank in range(ranks) if rank not in known])
            raise LaunchError(f"{missing} of {ranks} did not start within {start:g} s", _agent_log(folder))
        time.sleep(POLL_SECONDS)
    try:
        agent.wait(limit)
    except subprocess.TimeoutExpired:
        raise _who_hangs(agent, ranks, folder, limit) from None


def _who_hangs(agent: subprocess.Popen[bytes], ranks: int, folder: Path, limit: float) -> LaunchError:
    """The ranks that are furthest behind, where the others are, and the end of the first one's log."""
    known, alive = statuses(folder), processes.descendants(agent.pid)
    for status in known.values():
        if status.pid in alive:
            _write_stack(status.pid)
    time.sleep(STACK_SECONDS)
    behind = [rank for rank, status in known.items() if status.order == min(s.order for s in known.values())]
    first = known[behind[0]]
    gone = "" if first.pid in alive else ", whose process is gone,"
    ahead: dict[str, list[int]] = {}
    for rank in known:
        if rank not in behind:
            ahead.setdefault(known[rank].stage, []).append(rank)
    others = "".join(f"; {_names(them)} at {stage!r}" for stage, them in ahead.items())
    reason = f"{_names(behind)} of {ranks}{gone} did not finish within {limit:g} s: at {first.stage!r}{others}"
    return LaunchError(reason, _log(folder, behind[0]))


def _write_stack(pid: int) -> None:
    """Where every thread of a rank is, into its log."""
    with suppress(ProcessLookupError):
        os.kill(pid, STACK_SIGNAL)


def _who_failed(status: int, ranks: int, folder: Path) -> LaunchError:
    """The rank that failed first, what it said, how the others ended, and the end of its log."""
    try:
        ended = [Ended(**values) for values in json.loads((folder / FAILURES).read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return LaunchError(f"the agent of {ranks} ranks {Ended(-1, status)} before its ranks did", _agent_log(folder))
    known = statuses(folder)
    first, *others = sorted(ended, key=lambda one: _precedence(one, known.get(one.rank)))
    words: dict[str, list[int]] = {}
    for other in others:
        if _precedence(other, known.get(other.rank)) < ENDED_BY_AGENT:
            words.setdefault(_last_word(other, known.get(other.rank)), []).append(other.rank)
    also = "".join(f"; {_names(them)} {word}" for word, them in words.items())
    reason = f"rank {first.rank} of {ranks} {_last_word(first, known.get(first.rank))}{also}"
    return LaunchError(reason, _log(folder, first.rank))


def _precedence(ended: Ended, status: Status | None) -> tuple[int, float]:
    """Who failed first: without a word, as whoever misses that rank can still speak; then by the time of the word."""
    if status is not None and status.error is not None:
        return (1, status.seconds)
    return ENDED_BY_AGENT if ended.exitcode == -signal.SIGTERM else (0, 0.0)


def _last_word(ended: Ended, status: Status | None) -> str:
    if status is None:
        return f"{ended} before its first line"
    return f"failed at {status.stage!r}: {status.error}" if status.error is not None else f"{ended} at {status.stage!r}"


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _log(folder: Path, rank: int) -> str:
    return _tail(next(iter(folder.glob(f"{LOGS}/*/attempt_0/{rank}/stderr.log")), None), f"rank {rank}")


def _agent_log(folder: Path) -> str:
    return _tail(folder / AGENT_LOG, "the agent")


def _tail(path: Path | None, whose: str) -> str:
    """The last lines of a log, below its name."""
    lines = [] if path is None else path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        return f"{whose} wrote no log"
    return "\n  ".join([f"the end of {path}:", *lines[-LAST_LINES:]])
