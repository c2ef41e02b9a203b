"""Rules of the suite's judges, weakened one at a time: every mutant with all tests of its judge.

The tests of a judge are imported once; then every mutant has a process of its own, forked from there, which imports the
judge and its tests again and nothing else.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutations import Mutation, in_order, mutations

TABLE = Path("scripts", "mutants.toml")

FRESH = ("qwen2_npu.conformance", "qwen2_npu.cli", "tests", "conftest")
"""Packages that every mutant imports anew: what judges, and what uses it. The rest is the baseline's."""

OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--no-header"]
PASSED = 0
NOTICED = ("killed", "timeout")


@dataclass(frozen=True)
class Judge:
    """One file with rules. ``equal``: name of a mutation that no test can notice -> why."""

    path: str
    tests: tuple[str, ...]
    equal: dict[str, str]


@dataclass(frozen=True)
class Result:
    """What became of one mutant.

    Attributes:
        outcome: ``killed``, ``timeout``, ``survived``, ``equal`` (survived, with a reason), or ``left`` (no time).
        by: the test that noticed, where that is known.
    """

    path: str
    line: int
    name: str
    outcome: str
    reason: str = ""
    by: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.outcome}: {self.name}" + (f" ({self.reason})" if self.reason else "")


def judges(root: Path) -> list[Judge]:
    """The table: each judge with its tests and reasons."""
    content = tomllib.loads((root / TABLE).read_text(encoding="utf-8"))
    return [Judge(path, tuple(entry["tests"]), entry.get("equal", {})) for path, entry in content.items()]


# ---- one process per mutant -----------------------------------------------------------------------------------------
def _run_tests(tests: Sequence[str]) -> int:
    import pytest

    return int(pytest.main([*OPTIONS, *tests]))


def _forget() -> None:
    """Imported modules of FRESH, also where their packages hold them as attributes."""
    for name in [name for name in sys.modules if any(name == top or name.startswith(f"{top}.") for top in FRESH)]:
        package, _, child = name.rpartition(".")
        del sys.modules[name]
        if package in sys.modules:
            vars(sys.modules[package]).pop(child, None)
    importlib.invalidate_caches()


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def forked(tests: Sequence[str], limit: float) -> int | None:
    """The exit status of the tests in a process of their own; None if it took longer than ``limit`` seconds."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setpgid(0, 0)
            _silence()
            sys.dont_write_bytecode = True
            _forget()
            status = _run_tests(tests)
        finally:
            os._exit(status)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge_in(
    folder: Path,
    judge: Judge,
    seconds: float,
    known: dict[str, str],
    first: Collection[int] | None = None,
    minutes: float | None = None,
) -> Iterator[Result]:
    """Every mutant of one judge in the copy ``folder``, which is this process's own and its working directory.

    Args:
        known: name -> outcome of mutants that need not run.
        first: lines whose mutants come before the others; None keeps the order of the text.
        minutes: no mutant is begun later.
    """
    ends = math.inf if minutes is None else time.monotonic() + 60 * minutes
    target = folder / judge.path
    source = target.read_bytes()
    status = _run_tests(judge.tests)  # imports what all mutants share
    started = time.monotonic()
    if status != PASSED or (again := forked(judge.tests, 600)) != PASSED:
        raise SystemExit(f"{judge.path}: its tests do not pass without a mutant: {status if status else again}")
    limit = seconds + 10 * (time.monotonic() - started)
    for cached in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
        cached.unlink()
    noticed, left = set(), False
    every = mutations(source)
    for mutation in every if first is None else in_order(judge.path, every, first):
        if mutation.name in known:
            result = Result(judge.path, mutation.line, mutation.name, known[mutation.name])
        elif time.monotonic() > ends:
            left = True
            result = Result(judge.path, mutation.line, mutation.name, "left")
        else:
            target.write_bytes(mutation.apply(source))
            result = _result(judge, mutation, forked(judge.tests, limit))
        if result.outcome in NOTICED:
            noticed.add(mutation.name)
        yield result
    target.write_bytes(source)
    survived = {mutation.name for mutation in every} - noticed
    for name in judge.equal.keys() - survived if not left else ():
        yield Result(judge.path, 0, name, "stale reason", "no such mutation survives: take it out of the table")


def _result(judge: Judge, mutation: Mutation, status: int | None) -> Result:
    outcome = "timeout" if status is None else "survived" if status == PASSED else "killed"
    reason = judge.equal.get(mutation.name, "") if outcome == "survived" else ""
    return Result(judge.path, mutation.line, mutation.name, "equal" if reason else outcome, reason)


def judge_alone(
    folder: Path,
    judge: Judge,
    seconds: float,
    again: Path | None,
    first: Collection[int] | None = None,
    minutes: float | None = None,
) -> list[Result]:
    """The same in a process of its own, so that the next judge finds nothing imported."""
    results = folder.parent / "results.jsonl"
    results.unlink(missing_ok=True)
    given = {
        "path": judge.path,
        "results": str(results),
        "seconds": seconds,
        "again": None if again is None else str(again.resolve()),
        "first": None if first is None else sorted(first),
        "minutes": minutes,
    }
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, folder / "scripts" / "judges.py", json.dumps(given)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{judge.path}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [Result(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]


def outcomes_in(again: Path | None, path: str) -> dict[str, str]:
    """An earlier run: name of the mutant -> outcome."""
    results = [] if again is None else json.loads(again.read_text(encoding="utf-8")).get(path, {}).get("results", [])
    return {result["name"]: result["outcome"] for result in results}


def noticed_in(again: Path | None, path: str) -> dict[str, str]:
    """What was noticed in it."""
    return {name: outcome for name, outcome in outcomes_in(again, path).items() if outcome in NOTICED}


def _worker(path: str, results: str, seconds: float, again: str | None, **order: Any) -> None:
    root = Path(__file__).resolve().parents[1]
    (judge,) = [judge for judge in judges(root) if judge.path == path]
    with Path(results).open("w", encoding="utf-8") as out:
        for result in judge_in(root, judge, seconds, noticed_in(Path(again) if again else None, path), **order):
            out.write(json.dumps(asdict(result)) + "\n")
            out.flush()


if __name__ == "__main__":
    _worker(**json.loads(sys.argv[1]))
