"""What regressed, by how much, against which last-good commit."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report.changes import Change, Kind, changes
from qwen2_npu.conformance.report.claims import Claim, Status, Value
from qwen2_npu.conformance.report.history import Entry, Run
from tests.unit.conformance.report.synthetic import (
    CHANGED_GRAPH,
    DRIFTING,
    IDENTITY,
    MISSING_GRAPH,
    SLOW,
    WRONG_STEP,
    Night,
    commit_of,
)

ID = "latency/x"


def claim(status: Status = Status.PASS, ms: float | None = 24.0, **changes: object) -> Claim:
    value = None if ms is None else Value(ms, "ms")
    return replace(
        Claim(ID, "Latency", "x", status, subject="s", verified=Verified.read("npu (x)"), value=value), **changes
    )


def run(number: int, found: Claim | None, **identity: object) -> Run:
    provenance = Night(number, identity={**IDENTITY, **identity}).provenance
    return Run(provenance, {} if found is None else {found.id: Entry.of(found)})


def found(now: Claim, *before: Run) -> list[Change]:
    return changes([now], run(20, now), before)


# ---- the eventful night ---------------------------------------------------------------------------------------------
def test_what_regressed_since_which_commit(night) -> None:  # type: ignore[no-untyped-def]
    slow = night.change(f"latency/{SLOW}")
    assert slow.kind is Kind.REGRESSED
    assert slow.amount == "23.4 → 27.1 ms (+16\u00a0%)"
    assert slow.last_good.provenance.commit == commit_of(9)
    assert slow.first_bad.provenance.commit == commit_of(10)


def test_a_regression_of_this_very_run(night) -> None:  # type: ignore[no-untyped-def]
    wrong = night.change(f"accuracy/eager/{WRONG_STEP}")
    assert (wrong.kind, wrong.first_bad) == (Kind.REGRESSED, None)
    assert wrong.last_good.provenance.commit == commit_of(10)


def test_the_rest_of_the_night(night) -> None:  # type: ignore[no-untyped-def]
    assert night.change(f"graphs/{CHANGED_GRAPH}").kind is Kind.REGRESSED
    lost, drifted = night.change(f"graphs/{MISSING_GRAPH}"), night.change(f"latency/{DRIFTING}")
    assert (lost.kind, drifted.kind) == (Kind.LOST, Kind.DRIFTED)
    assert drifted.last_good.provenance.commit == commit_of(7)
    assert [change.kind for change in night.changes] == [Kind.REGRESSED] * 4 + [Kind.LOST, Kind.DRIFTED]


# ---- rules ----------------------------------------------------------------------------------------------------------
def test_nothing_changed() -> None:
    assert found(claim(), run(0, claim()), run(1, claim())) == []


def test_no_history_is_no_regression() -> None:
    (change,) = found(claim(Status.FAIL))
    assert (change.kind, change.last_good) == (Kind.FAILING, None)


def test_another_fingerprint_is_said_and_not_compared() -> None:
    (change,) = found(claim(Status.FAIL), run(0, claim(), cann="8.5.0"))
    assert (change.kind, change.last_good, change.good_value) == (Kind.FAILING, None, None)
    assert "under another fingerprint: cann: 8.5.0 → 8.2.RC1" in change.note


@pytest.mark.parametrize(
    "other",
    [
        {"verified": Verified.read("emulated (x)")},
        {"verified": Verified()},
        {"subject": "other weights"},
        {"subject": ""},
    ],
)
def test_another_device_or_subject_is_not_compared(other: dict[str, Any]) -> None:
    (change,) = found(claim(Status.FAIL), run(0, claim(**other)))
    assert change.kind is Kind.FAILING


@pytest.mark.parametrize("other", [{}, {"verified": Verified.read("emulated (x)")}, {"subject": ""}], ids=str)
def test_what_does_not_say_its_subject_is_compared_on_the_same_device(other: dict[str, Any]) -> None:
    (change,) = found(claim(Status.FAIL, subject=""), run(0, claim(**other)))
    assert change.kind is (Kind.FAILING if "verified" in other else Kind.REGRESSED)


def test_a_later_run_is_no_history() -> None:
    (change,) = found(claim(Status.FAIL), run(25, claim()))
    assert change.kind is Kind.FAILING


def test_the_last_good_is_the_newest_good() -> None:
    before = [run(0, claim()), run(1, claim(Status.FAIL)), run(2, claim()), run(3, None), run(4, claim(Status.FAIL))]
    (change,) = found(claim(Status.FAIL, 30.0), *before)
    assert change.last_good is before[2]
    assert change.first_bad is before[4], "the run that said nothing is not the first bad one"


def test_no_longer_run() -> None:
    silent = claim(Status.NOT_RUN, None, verified=Verified(), subject="")
    (change,) = found(silent, run(0, claim()))
    assert change.kind is Kind.LOST
    assert found(silent, run(0, claim(Status.FAIL))) == []
    assert found(silent, run(0, claim(), cann="other")) == []
    assert [change.kind for change in found(silent, run(0, claim()), run(1, claim(Status.FAIL)))] == [Kind.LOST]
    assert found(silent, run(0, claim()), run(1, claim(Status.NOT_COMPARABLE))) == []


def test_passes_again() -> None:
    (change,) = found(claim(), run(0, claim()), run(1, claim(Status.FAIL, 30.0)))
    assert change.kind is Kind.FIXED
    assert change.amount == "30 → 24 ms (-20\u00a0%)"
    assert found(claim(), run(0, claim()), run(1, claim(Status.FAIL)), run(2, claim())) == [], "said once"


def quiet(count: int, ms: float = 24.0, start: int = 0) -> list[Run]:
    return [run(start + i, claim(ms=ms * random.Random(i).uniform(0.995, 1.005))) for i in range(count)]


def test_a_slow_down_within_the_limit_is_seen_after_two_runs() -> None:
    assert found(claim(ms=25.5), *quiet(6)) == []
    (change,) = found(claim(ms=25.5), *quiet(6), run(6, claim(ms=25.5)))
    assert change.kind is Kind.DRIFTED
    assert change.last_good is not None
    assert change.last_good.provenance.commit == commit_of(5)


def test_a_slow_down_is_not_forgotten() -> None:
    """Recent runs would be their own baseline by now."""
    (change,) = found(claim(ms=25.5), *quiet(6), *quiet(10, 25.5, start=6))
    assert change.kind is Kind.DRIFTED
    assert change.last_good is not None
    assert change.last_good.provenance.commit == commit_of(5)


def test_too_few_runs_are_no_baseline() -> None:
    assert found(claim(ms=25.5), *quiet(3), run(4, claim(ms=25.5))) == []


def test_faster_is_no_change_for_the_worse() -> None:
    assert found(claim(ms=20.0), *quiet(6), run(6, claim(ms=20.0))) == []


def test_what_failed_is_no_measure_for_what_passes() -> None:
    """A step that leaves out work is fast, and wrong."""
    fast = [run(i, claim(Status.FAIL, 10.0 + i / 100)) for i in range(6)]
    assert found(claim(), *fast, run(7, claim()), run(8, claim())) == []


def ratio(number: float, **changes: Any) -> Claim:
    return claim(value=Value(number, "times as fast", lower_is_better=False), **changes)


def test_a_ratio_gets_worse_downwards() -> None:
    good = [run(i, ratio(1.7)) for i in range(5)]
    (change,) = found(ratio(1.4), *good, run(6, ratio(1.4)))
    assert change.kind is Kind.DRIFTED
    assert found(ratio(1.9), *good, run(6, ratio(1.9))) == []


def test_the_worst_come_first() -> None:
    now = [claim(Status.FAIL, 25.0), replace(claim(Status.FAIL, 40.0), id="latency/y")]
    before = Run(
        Night(0).provenance,
        {entry.id: Entry.of(replace(entry, status=Status.PASS, value=Value(20.0, "ms"))) for entry in now},
    )
    assert [change.claim.id for change in changes(now, run(20, None), [before])] == ["latency/y", ID]


def test_of_ratios_the_one_that_fell_comes_first() -> None:
    now = [replace(ratio(number, status=Status.FAIL), id=f"relative/{number}") for number in (3.0, 1.6)]
    before = Run(Night(0).provenance, {each.id: Entry.of(replace(ratio(2.0), id=each.id)) for each in now})
    assert [change.claim.id for change in changes(now, run(20, None), [before])] == ["relative/1.6", "relative/3.0"]
