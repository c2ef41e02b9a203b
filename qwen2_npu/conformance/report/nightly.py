"""Every suite on this machine, one process after the other, and the report at the end whatever happens.

A stage fails by its exit status, by not making the files it is there for, by taking too long, or by being interrupted.
What is known is written to ``run.json`` after every stage, so that even a killed run leaves its page's input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qwen2_npu
from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.machine.verified import Where, where
from qwen2_npu.conformance.report import inputs

ROOT = Path(qwen2_npu.__file__).parents[1]
"""The checkout: the suites are not part of an installed wheel."""

CLI = (sys.executable, "-m", "qwen2_npu.cli")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-ra")

MACHINE, BUNDLE, LOGS = "machine.json", "doctor.zip", "logs"
OURS = (
    inputs.VERIFY, inputs.JUNIT, inputs.BENCHMARK, inputs.RUN, inputs.PREDICTIONS, inputs.PAGE, inputs.SUMMARY,
    MACHINE, BUNDLE, f"{LOGS}/*.log",
)  # fmt: skip
"""Files of an earlier run in the same folder: they must not speak for this one."""

TIMED_OUT, INTERRUPTED = 124, 130
LAST_LINES = 15


@dataclass(frozen=True)
class Options:
    """What a run is asked for.

    Attributes:
        device: as the suites' --device; None for their default.
        quick: the fast lane of every suite: minutes, for pull requests.
        gate_rows: latency rows that are judged on a real NPU.
        workers: pytest processes of the suites that measure no time.
        minutes: a stage may take.
    """

    results: Path
    device: str | None = None
    model_path: Path | None = None
    quick: bool = False
    gate_rows: str = "*"
    workers: int = 0
    minutes: float = 240.0


@dataclass
class Stage:
    """One process. ``makes``: files it must leave in the results.

    ``status`` is None until it ran; ``problem`` says why it failed.
    """

    name: str
    command: tuple[str, ...]
    makes: tuple[str, ...] = ()
    status: int | None = None
    seconds: float = 0.0
    problem: str = ""
    tail: list[str] = field(default_factory=list)

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


def machine_stage(options: Options) -> Stage:
    """Says which commit, device and fingerprint all others are of; a process of its own, which leaves no NPU held."""
    device = ("--device", options.device) if options.device else ()
    return Stage("machine", (*CLI, "nightly", "--machine", str(options.results / MACHINE), *device), (MACHINE,))


def stages(options: Options, verified: str) -> list[Stage]:
    """What follows the machine's stage.

    Args:
        verified: what the machine's stage found; latency is gated on a real NPU alone.
    """
    results, kind = options.results, where(verified)
    device = ("--device", options.device) if options.device else ()
    model = ("--model-path", str(options.model_path)) if options.model_path else ()
    lane = ("-m", "not slow") if options.quick else ()
    workers = ("-n", str(options.workers)) if options.workers else ()
    gate = ("--gate", "--gate-rows", options.gate_rows) if kind is Where.NPU else ()

    def verify(mode: str, name: str) -> Stage:
        steps = ("--steps", "swiglu") if options.quick and mode != "eager" else ()
        command = (*CLI, "verify", "--mode", mode, "--json", str(results / name), *steps, *model, *device)
        return Stage(f"verify {mode}", command, (name,))

    def suite(name: str, *more: str) -> Stage:
        junit = f"{name}.xml"
        command = (*PYTEST, f"tests/{name}", f"--junitxml={results / junit}", *lane, *device, *more)
        return Stage(name, command, (junit,))

    found = [Stage("doctor", (*CLI, "doctor", "--bundle", str(results / BUNDLE), *device), (BUNDLE,))]
    found.append(verify("eager", "verify.json"))
    if kind in (Where.NPU, Where.EMULATED):
        found.append(verify("torchair", "verify-torchair.json"))
    found.append(suite("accuracy", *model, *workers))
    found.append(suite("graph", *workers))
    found.append(suite("perf", *model, f"--benchmark-json={results / 'benchmark.json'}", *gate))
    return found


def clear(results: Path) -> None:
    """Remove what an earlier run left; the history stays."""
    for pattern in OURS:
        for path in results.glob(pattern):
            path.unlink()


def run(
    options: Options,
    say: Callable[[str], None],
    plan: Callable[[Options, str], Sequence[Stage]] = stages,
    machine: Callable[[Options], Stage] = machine_stage,
) -> list[Stage]:
    """All stages. Never raises for what a stage does; an interrupt ends the running stage and skips the rest.

    Args:
        say: called with every line of output.
        plan, machine: the stages; see :func:`stages` and :func:`machine_stage`.
    """
    import json

    clear(options.results)
    (options.results / LOGS).mkdir(parents=True, exist_ok=True)
    first = machine(options)
    done, provenance = [first], {}
    interrupted = not _run(first, options, say)
    with suppress(OSError, ValueError):
        provenance = json.loads((options.results / MACHINE).read_text(encoding="utf-8"))
    # A machine that cannot be named is not a real NPU, and every stage shows what is wrong with it.
    done += plan(options, provenance.get("verified") or "")
    for stage in done:
        _write(options, provenance, done)
        if stage is not first and not interrupted:
            interrupted = not _run(stage, options, say)
    _write(options, provenance, done)
    return done


def _write(options: Options, provenance: Mapping[str, Any], done: Sequence[Stage]) -> None:
    content = {
        "schema": 1,
        "provenance": dict(provenance),
        "quick": options.quick,
        "stages": [stage.to_json() for stage in done],
    }
    write_json(options.results / inputs.RUN, content)


def _run(stage: Stage, options: Options, say: Callable[[str], None]) -> bool:
    """One stage to its end. False where the user interrupted it."""
    say(f"── {stage.name}: {stage.to_json()['command']}")
    start, timed_out, going_on = time.monotonic(), threading.Event(), True
    log = options.results / LOGS / f"{stage.name.replace(' ', '-')}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that a stage that hangs ends with all its children
            )
        except OSError as error:
            stage.status, stage.problem = 127, str(error)
            return True

        def give_up() -> None:
            timed_out.set()
            _end(process)

        timer = threading.Timer(options.minutes * 60, give_up)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                stage.tail = [*stage.tail[-LAST_LINES + 1 :], line.rstrip()]
                say(line.rstrip())
            stage.status = process.wait()
        except KeyboardInterrupt:
            _end(process)
            process.wait()
            stage.status, stage.problem, going_on = INTERRUPTED, "interrupted", False
        finally:
            timer.cancel()
    stage.seconds = time.monotonic() - start
    if timed_out.is_set():
        stage.status, stage.problem = TIMED_OUT, f"took longer than {options.minutes:g} minutes and was ended"
    missing = [name for name in stage.makes if not (options.results / name).exists()]
    if stage.status == 0 and missing:
        stage.status, stage.problem = 1, f"ended well and did not make {', '.join(missing)}"
    if stage.status and not stage.problem:
        last = next((line for line in reversed(stage.tail) if line.strip()), "no output")
        stage.problem = "\n".join([f"{last} (see {LOGS}/{log.name})", *stage.tail])
    say(f"── {stage.name}: {'passed' if stage.status == 0 else f'FAILED ({stage.status})'}, {stage.seconds:.0f} s")
    return going_on


def _end(process: subprocess.Popen[str]) -> None:
    """The stage and the processes it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
