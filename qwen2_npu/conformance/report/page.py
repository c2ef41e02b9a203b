"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.report import bench, figures, graphs, rerun_command
from qwen2_npu.conformance.report.changes import Change, Kind, changes
from qwen2_npu.conformance.report.charts.canvas import HOW_TO_INSTALL
from qwen2_npu.conformance.report.charts.kernels import ALL_KINDS
from qwen2_npu.conformance.report.charts.trend import trend
from qwen2_npu.conformance.report.claims import Claim, Status, without_result
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.overview import CLASSES, GLYPHS, anchor, overviews
from qwen2_npu.conformance.report.predictions import predictions
from qwen2_npu.conformance.report.results import Results

HERE = Path(__file__).parent
TEMPLATE, STYLE = "page.html.j2", "page.css"

RUNS_SHOWN = 20

NO_RESULT = {Status.NOT_RUN: "were not run", Status.NOT_COMPARABLE: "cannot be compared here"}
"""How the first line counts what neither passed nor failed."""


@dataclass(frozen=True)
class PageVerdict:
    """The page's first line. ``style``: of the statuses, "warn" where nothing failed and not all was run."""

    text: str
    style: str


def render(results: Results, history: Sequence[Run], problems: Sequence[str] = ()) -> str:
    """The page.

    Args:
        history: earlier runs, oldest first.
        problems: what is wrong beside what ``results`` say themselves.

    Raises:
        ValueError: matplotlib or jinja2 is missing, with the way to get it.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ValueError(HOW_TO_INSTALL) from error
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(TEMPLATE).render(_context(results, history, problems))


def _context(results: Results, history: Sequence[Run], problems: Sequence[str]) -> dict[str, Any]:
    this = Run.of(results)
    found = changes(results.claims, this, history)
    predicted, predicted_by = predictions(results.inputs)
    lowered = [c for c in results.claims if c.area == graphs.AREA and c.status is not Status.NOT_RUN]
    numbers = figures.Numbers.of(results.claims, predicted)
    return {
        "style": (HERE / STYLE).read_text(encoding="utf-8"),
        "results": results,
        "this": this,
        "verdict": verdict(results, found, problems),
        "problems": [*results.problems, *problems],
        "changes": [(change, _trend(change, this, history)) for change in found],
        "bisections": bisections(found, this),
        "again": lambda claim: rerun_command.command(claim, results.provenance.identity),
        "comparable": [run for run in history if _comparable(run, this)],
        "overviews": overviews(results.claims, found),
        "counts": results.counts(),
        "no_result": without_result(results.claims),
        "areas": _areas(results.claims),
        "runs": [_remembered(run, this) for run in _newest(history, this)],
        "differences": _differences(history, this),
        "identity": json.dumps(dict(results.provenance.identity), indent=1, ensure_ascii=False),
        "ladders": figures.ladders(numbers),
        "sweeps": figures.sweeps(numbers),
        "benches": bench.tables(results.inputs),
        "roofline": figures.rooflines(numbers),
        "accuracies": figures.accuracies(results.inputs),
        "census": figures.censuses(),
        "kinds": ALL_KINDS,
        "changed_graphs": [claim for claim in lowered if claim.status is Status.FAIL],
        "lowered": lowered,
        "measured": any(claim.value for claim in numbers.claims.values()),
        "predicted_by": predicted_by,
        "anchor": anchor,
        "classes": CLASSES,
        "glyphs": GLYPHS,
        "Status": Status,
        "Kind": Kind,
    }


def _comparable(run: Run, this: Run) -> bool:
    return run.digest == this.digest and run.provenance.created < this.provenance.created


def verdict(results: Results, found: Sequence[Change], problems: Sequence[str] = ()) -> PageVerdict:
    """What happened, in one sentence; the worst first. Only a run in which everything passed is green."""
    counts = results.counts()
    kinds = {kind: [change for change in found if change.kind is kind] for kind in Kind}
    parts = []
    if regressed := kinds[Kind.REGRESSED]:
        runs = [change.last_good for change in regressed if change.last_good is not None]
        oldest = min(runs, key=lambda run: run.provenance.created)
        parts.append(f"{_checks(len(regressed))} regressed since {oldest.commit} ({oldest.date})")
    if failing := kinds[Kind.FAILING]:
        parts.append(f"{_checks(len(failing))} {_verb(len(failing), 'fail')} and passed in no earlier run")
    if bad_files := [*results.problems, *problems]:
        parts.append(f"{len(bad_files)} {'problem' if len(bad_files) == 1 else 'problems'} with the files")
    if lost := kinds[Kind.LOST]:
        parts.append(f"{_checks(len(lost))} passed before and {'was' if len(lost) == 1 else 'were'} not run")
    if drifted := kinds[Kind.DRIFTED]:
        parts.append(f"{_checks(len(drifted))} {_verb(len(drifted), 'pass')} but got worse")
    if parts:
        failed = counts[Status.FAIL] or results.problems or problems
        return PageVerdict("; ".join(parts), "fail" if failed else "warn")
    if not counts[Status.PASS]:
        return PageVerdict("Nothing was run", "warn")
    missing = [f"{counts[status]} {text}" for status, text in NO_RESULT.items() if counts[status]]
    if missing:
        passed = f"{counts[Status.PASS]} of {len(results.claims)} checks passed"
        return PageVerdict(f"Nothing failed; {', '.join([passed, *missing])}", "warn")
    return PageVerdict(f"All {len(results.claims)} checks pass", "pass")


def _checks(count: int) -> str:
    return f"{count} check{'' if count == 1 else 's'}"


def _verb(count: int, verb: str) -> str:
    return {"fail": "fails", "pass": "passes"}[verb] if count == 1 else verb


def bisection(change: Change, this: Run) -> str:
    """How to find the commit between the last good run and the first bad one; or that the commit is not it."""
    if change.last_good is None or change.kind is Kind.FIXED:
        return ""
    good, bad = change.last_good.provenance, (change.first_bad or this).provenance
    if not good.commit or not bad.commit:
        return ""
    if good.commit == bad.commit:
        if good.dirty or bad.dirty:
            return "the same commit, with uncommitted changes"
        return "the same commit: not the code; see what else changed on the machine"
    return f"git bisect start {bad.commit[:12]} {good.commit[:12]}"


def bisections(found: Sequence[Change], this: Run) -> list[tuple[str, str, int]]:
    """The different things to do about the changes: what to begin with, what to go on with, how many changes.

    To go on with is the test of the worst regression among them; empty where none of them fails a test.
    """
    counts: Counter[str] = Counter()
    runs: dict[str, str] = {}
    for change in found:
        if start := bisection(change, this):
            counts[start] += 1
            test = (
                rerun_command.command(change.claim, this.provenance.identity) if change.kind is Kind.REGRESSED else ""
            )
            if test and start.startswith("git "):
                runs.setdefault(start, f"git bisect run {test}")
    return [(start, runs.get(start, ""), count) for start, count in counts.most_common()]


def _trend(change: Change, this: Run, history: Sequence[Run]) -> str:
    """The claim's numbers over comparable runs; empty where there are fewer than two."""
    values = []
    for run in history:
        entry = run.entries.get(change.claim.id)
        same = entry is not None and entry.subject == change.claim.subject and entry.verified == change.claim.verified
        if not (_comparable(run, this) and same and entry is not None and entry.value is not None):
            continue
        if math.isfinite(entry.value.number):
            values.append((entry.value.number, entry.status is Status.PASS))
    now = change.claim.value
    if now is None or not math.isfinite(now.number) or not values:
        return ""
    good = change.claim.status is Status.PASS and change.kind is not Kind.DRIFTED
    return trend([*values, (now.number, good)], f"{change.claim.title} over the last runs")


def _areas(claims: Sequence[Claim]) -> list[tuple[str, list[Claim], str]]:
    """Area, its claims, and a summary of their statuses."""
    areas: dict[str, list[Claim]] = {}
    for claim in claims:
        areas.setdefault(claim.area, []).append(claim)
    made = []
    for name, own in areas.items():
        counted = [(status, sum(claim.status is status for claim in own)) for status in Status]
        made.append((name, own, ", ".join(f"{count} {status}" for status, count in counted if count)))
    return made


def _newest(history: Sequence[Run], this: Run) -> list[Run]:
    """This run and the newest others, newest first."""
    others = [run for run in history if run.name != this.name]
    return sorted([this, *others], key=lambda run: run.provenance.created, reverse=True)[:RUNS_SHOWN]


def _remembered(run: Run, this: Run) -> dict[str, Any]:
    statuses = [entry.status for entry in run.entries.values()]
    return {
        "run": run,
        "is_this": run is this,
        "comparable": run.digest == this.digest,
        "passed": statuses.count(Status.PASS),
        "failed": statuses.count(Status.FAIL),
    }


def _differences(history: Sequence[Run], this: Run) -> str:
    """How the newest run of another fingerprint differs; empty where there is none."""
    others = [run for run in history if run.digest != this.digest and run.provenance.identity]
    if not others or not this.provenance.identity:
        return ""
    newest = others[-1]
    return f"{newest.date}, {newest.commit}: " + "; ".join(
        newest.provenance.fingerprint.differences(this.provenance.fingerprint)
    )
