"""What a run changed: what regressed, by how much, against which last-good commit.

An earlier run counts only with the same fingerprint, and a claim only with the same subject and the same kind of
device. A claim that passes may still have slowed down: its value is compared with the *best* five consecutive
runs, by the latency gate's own prediction interval. Recent runs would not do: they forget a slow-down by
themselves. Two runs in a row must be outside: in simulated noise of 1 %, one alone is outside in 2 of 100 runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qwen2_npu.conformance.perf.prediction_interval import MINIMUM_RUNS, NARROWEST, Interval, prediction_interval
from qwen2_npu.conformance.report import stages, suites
from qwen2_npu.conformance.report.claims import Claim, Status, Value
from qwen2_npu.conformance.report.history import Entry, Run


class Kind(StrEnum):
    """From the worst to the best."""

    REGRESSED = "regressed"
    FAILING = "fails"
    LOST = "no longer run"
    DRIFTED = "got worse"
    FIXED = "passes again"


@dataclass(frozen=True)
class Change:
    """One claim's change.

    Attributes:
        last_good: the newest comparable run that passed; None where there is none.
        first_bad: the run after it; None where it is this one.
        good_value: the claim's value at ``last_good``.
        note: what else is known.
    """

    claim: Claim
    kind: Kind
    last_good: Run | None = None
    first_bad: Run | None = None
    good_value: Value | None = None
    note: str = ""

    @property
    def amount(self) -> str:
        """By how much, in words; empty where there is no number to say it with."""
        now = self.claim.value
        if now is None:
            return self.claim.reference if self.claim.status is Status.FAIL else ""
        return str(now) if self.good_value is None else now.change_from(self.good_value)

    @property
    def relative(self) -> float:
        """The change as a part, for sorting: worse is more."""
        now, then = self.claim.value, self.good_value
        if now is None or then is None or not then.number:
            return 0.0
        part = now.number / then.number - 1
        part = part if now.lower_is_better else -part
        return math.inf if math.isnan(part) else part


def changes(claims: Sequence[Claim], this: Run, history: Sequence[Run]) -> list[Change]:
    """Every change, the worst first.

    Args:
        history: oldest first; this run itself and later ones are left out.
    """
    before = [run for run in history if run.provenance.created < this.provenance.created and run.name != this.name]
    comparable = [run for run in before if run.digest == this.digest]
    others = [run for run in before if run.digest != this.digest]
    found = [change for claim in claims for change in _changes_of(claim, this, comparable, others)]
    return sorted(found, key=_urgency)


def _urgency(change: Change) -> tuple[int, bool, float]:
    """Smaller comes first; what speaks for many tests at once comes after what names a step, a graph or a row."""
    broad = change.claim.area in (suites.FILES, stages.AREA)
    return list(Kind).index(change.kind), broad, -change.relative


def _changes_of(claim: Claim, this: Run, comparable: Sequence[Run], others: Sequence[Run]) -> Iterator[Change]:
    past = [(run, run.entries[claim.id]) for run in comparable if _same(claim, run.entries.get(claim.id))]
    good = [(run, entry) for run, entry in past if entry.status is Status.PASS]
    if claim.status is Status.FAIL:
        if good:
            run, entry = good[-1]
            yield Change(claim, Kind.REGRESSED, run, _after(run, past), entry.value)
        else:
            never = "never passed on this fingerprint" if comparable else "no earlier run of this fingerprint"
            yield Change(claim, Kind.FAILING, note=_elsewhere(claim, this, others) or never)
    elif claim.status is Status.PASS:
        yield from _drift(claim, good)
        if past and past[-1][1].status is Status.FAIL:
            bad_run, bad = past[-1]
            yield Change(claim, Kind.FIXED, bad_run, good_value=bad.value, note=f"failed at {bad_run.commit}")
    elif comparable:
        # Without a result now, subject and device are not known: the last run with a result counts.
        last = [(run, run.entries[claim.id]) for run in comparable if claim.id in run.entries]
        passed = [(run, entry) for run, entry in last if entry.status is Status.PASS]
        if passed and last[-1][1].status is not Status.NOT_COMPARABLE:
            run, entry = passed[-1]
            yield Change(claim, Kind.LOST, run, _after(run, last), entry.value)


def _same(claim: Claim, entry: Entry | None) -> bool:
    if entry is None or entry.verified.where is not claim.where:
        return False
    # A test that broke before it could say what it tested is compared all the same.
    return not claim.subject or claim.subject == entry.subject


def _after(run: Run, past: Sequence[tuple[Run, Entry]]) -> Run | None:
    """The first run after the last good one."""
    return next((other for other, _ in past if other.provenance.created > run.provenance.created), None)


def _elsewhere(claim: Claim, this: Run, others: Sequence[Run]) -> str:
    """That it passed on another fingerprint: said, and never compared."""
    for run in reversed(others):
        entry = run.entries.get(claim.id)
        if _same(claim, entry) and entry is not None and entry.status is Status.PASS:
            differing = run.provenance.fingerprint.differences(this.provenance.fingerprint)
            return f"passed at {run.commit} ({run.date}) under another fingerprint: {'; '.join(differing)}"
    return ""


def _drift(claim: Claim, good: Sequence[tuple[Run, Entry]]) -> Iterator[Change]:
    now = claim.value
    past = [(run, entry.value) for run, entry in good if entry.value is not None and entry.value.number > 0]
    if now is None or not math.isfinite(now.number) or now.number <= 0:
        return
    reference = _best([value for _, value in past], now.lower_is_better)
    if reference is None or not _worse(now, reference) or not _worse(past[-1][1], reference):
        return
    run, value = next((run, value) for run, value in reversed(past) if not _worse(value, reference))
    yield Change(
        claim,
        Kind.DRIFTED,
        run,
        _after(run, good),
        value,
        note=f"{reference.low:.4g} to {reference.high:.4g} {now.unit} expected from its best {MINIMUM_RUNS} runs",
    )


def _best(values: Sequence[Value], lower_is_better: bool) -> Interval | None:
    """The interval of the best consecutive runs; None where there are too few."""
    windows = [[value.number for value in values[i : i + MINIMUM_RUNS]] for i in range(len(values) - MINIMUM_RUNS + 1)]
    intervals = [_interval(window) for window in windows if all(map(math.isfinite, window))]
    sign = 1 if lower_is_better else -1
    return min(intervals, key=lambda interval: sign * interval.centre, default=None)


def _interval(window: Sequence[float]) -> Interval:
    if len(set(window)) == 1:  # a count, or arithmetic that repeats itself
        return Interval(window[0], 1 + NARROWEST)
    return prediction_interval(window)


def _worse(value: Value, reference: Interval) -> bool:
    return value.number > reference.high if value.lower_is_better else value.number < reference.low
