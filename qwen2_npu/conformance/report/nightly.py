"""Every suite on this machine, one process after the other, and the report at the end whatever happens.

A stage fails by its exit status, by not making the files it is there for, by taking too long, or by being interrupted.
What is known is written to ``run.json`` after every stage, so that even a killed run leaves its page's input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qwen2_npu
from qwen2_npu.conformance.children import NOT_STARTED, Child, Stop
from qwen2_npu.conformance.files import not_written, write_json
from qwen2_npu.conformance.machine.verified import Verified, Where
from qwen2_npu.conformance.report import inputs
from qwen2_npu.conformance.report.own_files import ELSEWHERE, LOGS, locked
from qwen2_npu.optimizations import LADDER

ROOT = Path(qwen2_npu.__file__).parents[1]
"""The checkout: the suites are not part of an installed wheel."""

CLI = (sys.executable, "-m", "qwen2_npu.cli")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-ra")

MACHINE, BUNDLE, TIMES = "machine.json", "doctor.zip", "benchmark.json"

LONGEST = Where.NPU
"""What is verified where no stage is left out."""

TIMED_OUT = 124
LAST_LINES = 15


@dataclass(frozen=True)
class NightlyOptions:
    """What a run is asked for.

    Attributes:
        device: as the suites' --device; None for their default.
        quick: the fast lane of every suite: minutes, for pull requests.
        gate_rows: latency rows that are judged on a real NPU.
        workers: pytest processes of the suites that measure no time.
        minutes: a stage may take.
        stop: what signals asked for.
    """

    results: Path
    device: str | None = None
    model_path: Path | None = None
    quick: bool = False
    gate_rows: str = "*"
    workers: int = 0
    minutes: float = 240.0
    stop: Stop = field(default_factory=Stop, compare=False)


@dataclass
class Stage:
    """One process.

    Attributes:
        makes: files that it must leave in the results.
        may_make: files that it leaves there where there is something to write.
        status: None until it ran.
        problem: why it failed.
    """

    name: str
    command: tuple[str, ...]
    makes: tuple[str, ...] = ()
    may_make: tuple[str, ...] = ()
    status: int | None = None
    seconds: float = 0.0
    problem: str = ""
    tail: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        """Its whole output, in the results."""
        return f"{LOGS}/{self.name.replace(' ', '-')}.log"

    def to_json(self) -> dict[str, Any]:
        """As run.json holds it; paths as they were given."""
        command = " ".join(("qwen2-npu", *self.command[3:]) if self.command[:3] == CLI else self.command[2:])
        return {
            "name": self.name,
            "makes": list(self.makes),
            "command": command,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "problem": self.problem,
        }


def machine_stage(options: NightlyOptions) -> Stage:
    """Says which commit, device and fingerprint all others are of; a process of its own, which leaves no NPU held."""
    device = ("--device", options.device) if options.device else ()
    return Stage("machine", (*CLI, "nightly", "--machine", str(options.results / MACHINE), *device), (MACHINE,))


def stages(options: NightlyOptions, where: Where) -> list[Stage]:
    """What follows the machine's stage.

    Args:
        where: what the machine's stage found; latency is gated on a real NPU alone.
    """
    results = options.results
    device = ("--device", options.device) if options.device else ()
    model = ("--model-path", str(options.model_path)) if options.model_path else ()
    lane = ("-m", "not slow") if options.quick else ()
    workers = ("-n", str(options.workers)) if options.workers else ()
    gate = ("--gate", "--gate-rows", options.gate_rows) if where is Where.NPU else ()

    def verify(mode: str, name: str) -> Stage:
        steps = ("--steps", LADDER[-1]) if options.quick and mode != "eager" else ()
        command = (*CLI, "verify", "--mode", mode, "--json", str(results / name), *steps, *model, *device)
        return Stage(f"verify {mode}", command, (name,))

    def suite(name: str, *more: str, may_make: tuple[str, ...] = ()) -> Stage:
        junit = f"{name}.xml"
        command = (*PYTEST, f"tests/{name}", f"--junitxml={results / junit}", *lane, *device, *more)
        return Stage(name, command, (junit,), may_make)

    found = [Stage("doctor", (*CLI, "doctor", "--bundle", str(results / BUNDLE), *device), (BUNDLE,))]
    found.append(verify("eager", "verify.json"))
    if where in (Where.NPU, Where.EMULATED):
        found.append(verify("torchair", "verify-torchair.json"))
    found.append(suite("accuracy", *model, *workers))
    found.append(suite("graph", *workers))
    # No row is measured on an emulated NPU, and pytest-benchmark then writes no file.
    found.append(suite("perf", *model, f"--benchmark-json={results / TIMES}", *gate, may_make=(TIMES,)))
    return found


def names(done: Sequence[Stage]) -> list[str]:
    """The files that a run of these stages leaves in its folder."""
    own = [inputs.RUN, inputs.PAGE, inputs.SUMMARY]
    return own + [name for stage in done for name in (*stage.makes, *stage.may_make, stage.log)]


def run(
    options: NightlyOptions,
    say: Callable[[str], None],
    plan: Callable[[NightlyOptions, Where], Sequence[Stage]] = stages,
    machine: Callable[[NightlyOptions], Stage] = machine_stage,
    finish: Callable[[], None] = lambda: None,
) -> list[Stage]:
    """All stages. Never raises for what a stage does; an interrupt ends the running stage and skips the rest.

    Args:
        say: called with every line of output.
        plan, machine: the stages; see :func:`stages` and :func:`machine_stage`.
        finish: called at the end, while the folder still belongs to this run alone.

    Returns:
        The stages; where run.json could not be written at the end, that is a failed one, too.

    Raises:
        ValueError: the folder is another run's, or holds files that are none of a nightly run's.
        OSError: the folder cannot be written.
    """
    with locked(options.results) as own:
        first = machine(options)
        own.start(names([first, *plan(options, LONGEST)]))
        try:
            done = _run_all(first, options, say, plan)
            finish()
        finally:
            own.finish()
    return done


def _run_all(
    first: Stage,
    options: NightlyOptions,
    say: Callable[[str], None],
    plan: Callable[[NightlyOptions, Where], Sequence[Stage]],
) -> list[Stage]:
    done: list[Stage] = [first]
    provenance: dict[str, Any] = {}
    _write(options, provenance, done)
    interrupted = not _run(first, options, say)
    with suppress(OSError, ValueError):
        provenance = json.loads((options.results / MACHINE).read_text(encoding="utf-8"))
    # A machine that cannot be named is not a real NPU, and every stage shows what is wrong with it.
    done += plan(options, Verified.read(provenance.get("verified")).where)
    for stage in done[1:]:
        _write(options, provenance, done)
        if not interrupted:
            interrupted = not _run(stage, options, say)
    problem = _write(options, provenance, done)
    if problem:
        say(f"error: {problem}")
        done.append(Stage(inputs.RUN, (), status=1, problem=problem))
    return done


def _write(options: NightlyOptions, provenance: Mapping[str, Any], done: Sequence[Stage]) -> str:
    """run.json as it is known by now. Why it could not be written, or nothing: it is written again after each stage."""
    content = {
        "schema": 1,
        "provenance": dict(provenance),
        "quick": options.quick,
        "stages": [stage.to_json() for stage in done],
    }
    try:
        write_json(options.results / inputs.RUN, content)
    except OSError as error:
        return not_written(options.results / inputs.RUN, error, ELSEWHERE)
    return ""


def _run(stage: Stage, options: NightlyOptions, say: Callable[[str], None]) -> bool:
    """One stage to its end. False where the user interrupted it."""
    stop = options.stop
    if stop.number is not None:
        stage.status, stage.problem = stop.status, stop.reason
        return False
    say(f"── {stage.name}: {stage.to_json()['command']}")
    start, timed_out = time.monotonic(), threading.Event()
    try:
        child = Child(stage.command, cwd=ROOT)
    except OSError as error:  # no more processes
        stage.status, stage.problem = NOT_STARTED, str(error)
        return True
    log = _Log(options.results / stage.log)

    def give_up() -> None:
        timed_out.set()
        child.end()

    timer = threading.Timer(options.minutes * 60, give_up)
    timer.start()
    interrupted = False
    try:
        with stop.ends(child):
            for line in child.output:
                log.write(line)
                stage.tail = [*stage.tail[-LAST_LINES + 1 :], line.rstrip()]
                say(line.rstrip())
    except KeyboardInterrupt:
        interrupted = True
        child.end()
    except BaseException:
        child.end()
        raise
    finally:
        timer.cancel()
        timer.join()
        stage.status = child.wait()
        log.close()
    stage.seconds = time.monotonic() - start
    if interrupted or stop.number is not None:
        stage.status, stage.problem = stop.status, stop.reason
    elif timed_out.is_set():
        stage.status, stage.problem = TIMED_OUT, f"took longer than {options.minutes:g} minutes and was ended"
    missing = [name for name in stage.makes if not (options.results / name).exists()]
    if stage.status == 0 and missing:
        stage.status, stage.problem = 1, f"ended well and did not make {', '.join(missing)}"
    if stage.status and not stage.problem:
        last = next((line for line in reversed(stage.tail) if line.strip()), "no output")
        stage.problem = "\n".join([f"{last} (see {stage.log})", *stage.tail])
    if log.problem:
        say(f"error: {log.problem}")
        stage.status = stage.status or 1
        stage.problem = "\n".join(part for part in (log.problem, stage.problem) if part)
    say(f"── {stage.name}: {'passed' if stage.status == 0 else f'FAILED ({stage.status})'}, {stage.seconds:.0f} s")
    return not interrupted and stop.number is None


class _Log:
    """A stage's output as a file. A full disk costs the rest of the file, not the stage.

    Attributes:
        problem: why the file is not whole; empty where it is.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._handle, self.problem = path, -1, ""
        with self._noting():
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def write(self, text: str) -> None:
        """Add ``text``, unless the file is given up already."""
        with self._noting():
            rest = b"" if self.problem else text.encode()
            while rest:
                rest = rest[os.write(self._handle, rest) :]

    def close(self) -> None:
        """The file is complete."""
        with self._noting():
            if self._handle >= 0:
                os.close(self._handle)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = not_written(self._path, error, ELSEWHERE)
