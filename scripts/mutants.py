"""Weakens rules one at a time, and sees whether a test notices: all of the suite's judges, a part of the library's.

    python scripts/mutants.py                      # every judge of mutants.toml, and one slice of library.toml
    python scripts/mutants.py --changed main       # what differs from a git reference, in four minutes
    python scripts/mutants.py --only compare       # those whose path contains the word
    python scripts/mutants.py --group library --slice tonight
    python scripts/mutants.py --json result.json
    python scripts/mutants.py --again result.json  # only what survived there; what was noticed is taken over
    python scripts/mutants.py --group library --slices 1 --pick untried --minutes 60

Works in a copy of the working tree, in a temporary directory. The tests of a judge are imported once; then every mutant
has a process of its own, forked from there, which imports the judge and its tests again and nothing else. The library
has too many tests for that: ``library.py`` and ``lane.py`` say how they are chosen and run. A mutant that no test
notices "survives": it needs a test, or a reason in the table. Exit status 1 if there is one without, or a reason for a
mutant that a test does notice.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from judges import NOTICED, Judge, Result, judge_alone, judges, noticed_in, outcomes_in
from lane import lane
from library import Library, nearness, work_for
from mutations import Mutation, in_order, key_of, mutations, part_of
from reached import Record, record

ROOT = Path(__file__).resolve().parents[1]

KEPT = ROOT / "docs" / "power.json"
"""Results of earlier runs: see ``power_page.py``."""

CHANGED_MINUTES = 4.0
"""For ``--changed``: with the copy and the last test that runs, five."""

TONIGHT = "tonight"

Left = Callable[[float], float | None]
"""A share of the minutes that are left; None: no end."""


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


def changed_lines(root: Path, reference: str, path: str) -> set[int]:
    """Lines of a file that a git reference does not have; all where git does not know the file."""
    command = ["git", "-C", str(root), "diff", "--unified=0", reference, "--", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if not text:
        return set(range(1, len((root / path).read_bytes().splitlines()) + 1))
    found: set[int] = set()
    for first, count in re.findall(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", text, re.MULTILINE):
        found |= set(range(int(first), int(first) + int(count or 1)))
    return found


def copy(root: Path, folder: Path) -> None:
    for name in files_of(root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)


def score(results: Sequence[Result]) -> dict[str, int]:
    """Outcome -> how many."""
    return {outcome: sum(r.outcome == outcome for r in results) for outcome in sorted({r.outcome for r in results})}


# ---- judges ---------------------------------------------------------------------------------------------------------
def selected(every: Sequence[Judge], only: str, changed: set[str] | None) -> list[Judge]:
    return [
        judge for judge in every if only in judge.path and (changed is None or changed & {judge.path, *judge.tests})
    ]


def run_judges(folder: Path, given: argparse.Namespace, changed: set[str] | None, left: Left) -> Iterator[list[Result]]:
    chosen = selected(judges(ROOT), given.only, changed)
    for number, judge in enumerate(chosen):
        first = None if changed is None else changed_lines(ROOT, given.changed, judge.path)
        share = left(1 / (len(chosen) - number))
        yield judge_alone(folder, judge, given.limit, given.again, first, share)


# ---- the library ----------------------------------------------------------------------------------------------------
def number_of(given: str, parts: int) -> int:
    """Which part ``--slice`` means."""
    number = datetime.date.today().toordinal() % parts if given == TONIGHT else int(given)
    if not 0 <= number < parts:
        raise SystemExit(f"--slice {given}: must be one of 0 to {parts - 1}, or {TONIGHT}")
    return number


def wanted(path: str, given: argparse.Namespace) -> list[Mutation]:
    """Those of the slice, or of the lines that changed."""
    every = mutations((ROOT / path).read_bytes())
    if given.changed is not None:
        lines = changed_lines(ROOT, given.changed, path)
        return in_order(path, [mutation for mutation in every if mutation.line in lines], lines)
    number = number_of(given.slice, given.slices)
    found = [mutation for mutation in every if part_of(path, mutation.name, given.slices) == number]
    if given.pick is None:
        return found
    entry = json.loads(KEPT.read_text(encoding="utf-8"))["library"].get(path, {})
    group_of = {key: group for group, keys in entry.items() for key in keys}
    return [mutation for mutation in found if group_of.get(key_of(path, mutation.name), "untried") == given.pick]


def recorded(
    folder: Path, given: argparse.Namespace, paths: Sequence[str], changed: set[str] | None, minutes: float | None
) -> Path:
    """What the tests reach: of all, kept in ``--record``; of those near to what changed, the nearest first."""
    file = folder.parent / "record.json.gz" if given.record is None else given.record
    if not file.exists():
        tests: list[str] = []
        if changed is not None:
            distance = {
                name: 0 if name in changed else min(nearness(path, name) for path in paths)
                for name in files_of(ROOT)
                if Path(name).name.startswith("test_")
            }
            tests = sorted((name for name, far in distance.items() if far < 2), key=lambda name: distance[name])
        work = folder.parent / "recording"
        work.mkdir()
        watched = paths if changed is not None else Library.load(ROOT).paths(ROOT)
        record(folder, watched, tests, work, minutes).save(file)
    return file


def run_library(
    folder: Path, given: argparse.Namespace, changed: set[str] | None, left: Left
) -> Iterator[list[Result]]:
    table = Library.load(ROOT)
    paths = [path for path in table.paths(ROOT) if given.only in path and (changed is None or path in changed)]
    tries = {path: wanted(path, given) for path in paths}
    known = {path: noticed_in(given.again, path) for path in paths}
    new = {path: [m for m in tries[path] if m.name not in known[path]] for path in paths}
    outcomes: dict[tuple[str, str], dict[str, Any]] = {}
    if any(new.values()):
        file = recorded(folder, given, paths, changed, left(0.5) if changed is not None else None)
        found = Record.load(file)
        plan = [w for p in paths for w in work_for(p, (ROOT / p).read_bytes(), new[p], found, given.budget)]
        before = {(p, name) for p in paths for name, was in outcomes_in(given.again, p).items() if was == "survived"}
        # What survived before, then the others in no order: where time ends, they are a sample.
        plan.sort(key=lambda w: ((w.path, w.name) not in before, part_of(w.path, w.name, 1 << 63)))
        for outcome in lane(folder, file, plan, left(1.0)):
            outcomes[outcome["path"], outcome["name"]] = outcome
            if given.log:
                print(f"  {outcome}", flush=True)
    for path in paths:
        results = [
            Result(path, m.line, m.name, known[path][m.name])
            if m.name in known[path]
            else _library_result(table, path, m, outcomes.get((path, m.name)))
            for m in tries[path]
        ]
        noticed = {result.name for result in results if result.outcome in NOTICED}
        results += [
            Result(path, 0, name, "stale reason", "a test notices it: take it out of the table")
            for name in noticed & table.equal.get(path, {}).keys()
        ]
        if results:
            yield results


def _library_result(table: Library, path: str, mutation: Mutation, outcome: dict[str, Any] | None) -> Result:
    if outcome is None:
        return Result(path, mutation.line, mutation.name, "left")
    words = {"failed": "killed", "timeout": "timeout", "passed": "survived"}
    reason = table.equal.get(path, {}).get(mutation.name, "") if outcome["outcome"] == "passed" else ""
    return Result(
        path, mutation.line, mutation.name, "equal" if reason else words[outcome["outcome"]], reason, outcome["by"]
    )


# ---- all of them ----------------------------------------------------------------------------------------------------
def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Weakens rules one at a time: does a test notice?")
    add = parser.add_argument
    add("--changed", metavar="REF", help="only what differs from a git reference: judges, or their tests, lines first")
    add("--only", default="", metavar="TEXT", help="only files with this in their path")
    add("--group", choices=["judges", "library"], help="only these (default: both)")
    add("--slice", default="0", metavar="K", help=f"of the library: the part to take, or {TONIGHT} (default: 0)")
    add("--slices", type=int, default=14, metavar="N", help="of how many (default: 14)")
    add(
        "--pick", choices=["untried", "missed"], help="of the library: what docs/power.json has no result of; or missed"
    )
    add("--again", type=Path, metavar="FILE", help="only mutants that survived in that result")
    add("--json", type=Path, metavar="FILE", help="write every result")
    add("--record", type=Path, metavar="FILE", help="of the library: read which tests reach what, or write it there")
    add("--budget", type=float, default=30.0, metavar="SECONDS", help="of tests for a mutant of the library")
    add("--minutes", type=float, help=f"begin no mutant later (default: no end; with --changed: {CHANGED_MINUTES:g})")
    add("--limit", type=float, default=10.0, metavar="SECONDS", help="of a judge, beside ten times what its tests take")
    add("--at-least", type=float, default=100.0, metavar="PERCENT", help="of the library noticed, or with a reason")
    add("--log", action="store_true", help="say of each mutant of the library what noticed it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what runs, and removes the copy
    changed = None if given.changed is None else changed_since(ROOT, given.changed)
    minutes = given.minutes if given.minutes is not None or changed is None else CHANGED_MINUTES
    began = time.monotonic()

    def left(share: float) -> float | None:
        return None if minutes is None else max(0.0, minutes - (time.monotonic() - began) / 60) * share

    found: dict[str, dict[str, Any]] = {}
    bad = {"judges": 0, "library": 0}
    tried = 0
    with tempfile.TemporaryDirectory(prefix="qwen2-npu-mutants-") as name:
        folder = Path(name, "tree")
        copy(ROOT, folder)
        for group, run in (("judges", run_judges), ("library", run_library)):
            if given.group not in (None, group):
                continue
            started = time.monotonic()
            for results in run(folder, given, changed, left):
                path = results[0].path
                print(f"{path}: {score(results)} in {time.monotonic() - started:.0f} s", flush=True)
                for result in results:
                    if result.outcome in ("survived", "stale reason"):
                        print(f"  {result}", flush=True)
                        bad[group] += 1
                found[path] = {
                    "group": group,
                    "budget": given.budget,
                    "mutants": len(mutations((ROOT / path).read_bytes())),
                    "score": score(results),
                    "results": list(map(asdict, results)),
                }
                tried += (group == "library") * sum(result.outcome != "left" for result in results)
                started = time.monotonic()
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return int(bad["judges"] > 0 or bad["library"] > tried * (1 - given.at_least / 100))


if __name__ == "__main__":
    raise SystemExit(main())
