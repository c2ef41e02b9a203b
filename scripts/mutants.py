"""Weakens the rules of the suite's judges one at a time, and sees whether a test notices.

    python scripts/mutants.py                      # every judge of scripts/mutants.toml
    python scripts/mutants.py --changed main       # those that differ from a git reference, or whose tests do
    python scripts/mutants.py --only compare       # those whose path contains the word
    python scripts/mutants.py --json result.json
    python scripts/mutants.py --again result.json  # only what survived there; what was noticed is taken over

Works in a copy of the working tree, in a temporary directory. The tests of a judge are imported once; then every mutant
has a process of its own, forked from there, which imports the judge and its tests again and nothing else. A mutant that
no test notices "survives": it needs a test, or a reason in ``scripts/mutants.toml``. Exit status 1 if there is one
without, or a reason for a mutant that a test does notice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path("scripts", "mutants.toml")
sys.path.insert(0, str(Path(__file__).parent))

from mutations import Mutation, mutations  # noqa: E402

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
    """What became of one mutant: ``killed``, ``timeout``, ``survived``, or ``equal`` (survived, with a reason)."""

    path: str
    line: int
    name: str
    outcome: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.outcome}: {self.name}" + (f" ({self.reason})" if self.reason else "")


def judges(root: Path) -> list[Judge]:
    """The table: each judge with its tests and reasons."""
    content = tomllib.loads((root / TABLE).read_text(encoding="utf-8"))
    return [Judge(path, tuple(entry["tests"]), entry.get("equal", {})) for path, entry in content.items()]


def files_of(root: Path) -> list[str]:
    """What git knows or would take."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


def changed_since(root: Path, reference: str) -> set[str]:
    """Files that differ from a git reference, those that git does not know among them."""
    differing = ["git", "-C", str(root), "diff", "--name-only", "-z", reference]
    new = ["git", "-C", str(root), "ls-files", "-z", "--others", "--exclude-standard"]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in (differing, new)
    ]
    return {name for output in outputs for name in output.split("\0") if name}


def copy(root: Path, folder: Path) -> None:
    for name in files_of(root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)


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


def judge_in(folder: Path, judge: Judge, seconds: float, known: dict[str, str]) -> Iterator[Result]:
    """Every mutant of one judge in the copy ``folder``, which is this process's own and its working directory.

    Args:
        known: name -> outcome of mutants that need not run.
    """
    target = folder / judge.path
    source = target.read_bytes()
    status = _run_tests(judge.tests)  # imports what all mutants share
    started = time.monotonic()
    if status != PASSED or (again := forked(judge.tests, 600)) != PASSED:
        raise SystemExit(f"{judge.path}: its tests do not pass without a mutant: {status if status else again}")
    limit = seconds + 10 * (time.monotonic() - started)
    for cached in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
        cached.unlink()
    noticed = set()
    for mutation in mutations(source):
        if mutation.name in known:
            result = Result(judge.path, mutation.line, mutation.name, known[mutation.name])
        else:
            target.write_bytes(mutation.apply(source))
            result = _result(judge, mutation, forked(judge.tests, limit))
        if result.outcome in NOTICED:
            noticed.add(mutation.name)
        yield result
    target.write_bytes(source)
    survived = {mutation.name for mutation in mutations(source)} - noticed
    for name in judge.equal.keys() - survived:
        yield Result(judge.path, 0, name, "stale reason", "no such mutation survives: take it out of the table")


def _result(judge: Judge, mutation: Mutation, status: int | None) -> Result:
    outcome = "timeout" if status is None else "survived" if status == PASSED else "killed"
    reason = judge.equal.get(mutation.name, "") if outcome == "survived" else ""
    return Result(judge.path, mutation.line, mutation.name, "equal" if reason else outcome, reason)


def judge_alone(folder: Path, judge: Judge, seconds: float, again: Path | None) -> list[Result]:
    """The same in a process of its own, so that the next judge finds nothing imported."""
    results = folder.parent / "results.jsonl"
    results.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    script = folder / "scripts" / "mutants.py"
    command = [sys.executable, script, "--worker", judge.path, "--json", results, "--limit", str(seconds)]
    command += [] if again is None else ["--again", again.resolve()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{judge.path}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [Result(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]


def _known(again: Path | None, path: str) -> dict[str, str]:
    """What was noticed in an earlier run."""
    results = [] if again is None else json.loads(again.read_text(encoding="utf-8")).get(path, {}).get("results", [])
    return {result["name"]: result["outcome"] for result in results if result["outcome"] in NOTICED}


def _worker(path: str, results: Path, seconds: float, again: Path | None) -> None:
    (judge,) = [judge for judge in judges(ROOT) if judge.path == path]
    with results.open("w", encoding="utf-8") as out:
        for result in judge_in(ROOT, judge, seconds, _known(again, path)):
            out.write(json.dumps(asdict(result)) + "\n")
            out.flush()


# ---- all of them ----------------------------------------------------------------------------------------------------
def score(results: Sequence[Result]) -> dict[str, int]:
    """Outcome -> how many."""
    return {outcome: sum(r.outcome == outcome for r in results) for outcome in sorted({r.outcome for r in results})}


def selected(every: Sequence[Judge], only: str, changed: set[str] | None) -> list[Judge]:
    return [
        judge for judge in every if only in judge.path and (changed is None or changed & {judge.path, *judge.tests})
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Weakens the suite's judges one rule at a time.")
    parser.add_argument("--changed", metavar="REF", help="only judges that differ from a git reference, or their tests")
    parser.add_argument("--only", default="", metavar="TEXT", help="only judges with this in their path")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only mutants that survived in that result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result")
    parser.add_argument(
        "--limit",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="for a mutant, beside ten times what the tests take",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        _worker(given.worker, given.json, given.limit, given.again)
        return 0
    changed = None if given.changed is None else changed_since(ROOT, given.changed)
    found: dict[str, dict[str, Any]] = {}
    bad = False
    with tempfile.TemporaryDirectory(prefix="qwen2-npu-mutants-") as name:
        folder = Path(name, "tree")
        copy(ROOT, folder)
        for judge in selected(judges(ROOT), given.only, changed):
            started = time.monotonic()
            results = judge_alone(folder, judge, given.limit, given.again)
            seconds = time.monotonic() - started
            print(f"{judge.path}: {score(results)} in {seconds:.0f} s", flush=True)
            for result in results:
                if result.outcome in ("survived", "stale reason"):
                    print(f"  {result}", flush=True)
                    bad = True
            found[judge.path] = {
                "seconds": round(seconds),
                "score": score(results),
                "results": list(map(asdict, results)),
            }
            if given.json:
                given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
