"""What a measurement says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.perf.measurement import Measurement, Summary

GOOD = Measurement(
    prefill_ms=100.0,
    decode_ms=(10.0, 11.0, 12.0),
    wall_ms=(100.1, 10.1, 11.1, 12.1),
    contexts=(0, 8, 9, 10),
    input_tokens=8,
    asked_steps=3,
    peak_bytes=1000,
    warnings=("busy",),
)


def test_a_good_one_has_no_faults() -> None:
    assert GOOD.faults() == []
    assert GOOD.samples("prefill") == (100.0,)
    assert GOOD.samples("decode") == GOOD.decode_ms
    assert GOOD.mean_context == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"asked_steps": 5}, "3 decode steps of 5 asked for"),
        ({"contexts": (0, 8, 8, 8)}, "does not grow by one token per step: before step 2 it holds 8 tokens, not 9"),
        ({"contexts": (0, 11, 11, 11)}, "before step 1 it holds 11 tokens, not 8"),
        ({"contexts": (0, 8, 9)}, "before step 3 it holds None tokens, not 10"),
        ({"decode_ms": (10.0, 0.0, 12.0)}, "the clock did not run"),
        ({"prefill_ms": float("nan")}, "the clock did not run"),
        (
            {"wall_ms": (100.1, 0.02, 11.1, 12.1)},
            "step 1: the host waited 0.020 ms for work that took",
        ),
    ],
)
def test_faults_are_named(changes: dict[str, object], message: str) -> None:
    faults = replace(GOOD, **changes).faults()  # type: ignore[arg-type]
    assert any(message in fault for fault in faults), faults


def test_summary() -> None:
    assert Summary.of([3.0, 1.0, 2.0]) == Summary(mean=2.0, median=2.0, p99=3.0)
    assert Summary.of(list(map(float, range(1, 101)))).p99 == 99.0
    assert Summary.of([5.0]) == Summary(5.0, 5.0, 5.0)


# ---- one call, several ranks ----------------------------------------------------------------------------------------
def test_of_several_ranks_the_slowest_counts_in_every_step() -> None:
    other = replace(
        GOOD, prefill_ms=90.0, decode_ms=(20.0, 1.0, 30.0), wall_ms=(), peak_bytes=2000, warnings=("busy", "hot")
    )
    found = Measurement.slowest([GOOD, other])
    assert (found.prefill_ms, found.decode_ms) == (100.0, (20.0, 11.0, 30.0))
    assert (found.peak_bytes, found.warnings, found.faults()) == (2000, ("busy", "hot"), [])
    assert found.contexts == GOOD.contexts
    assert Measurement.slowest([GOOD, replace(other, peak_bytes=None)]).peak_bytes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wall_ms": (1.0, 10.1, 11.1, 12.1)}, "rank 1: step 0: the host waited 1.000 ms for work that took"),
        ({"decode_ms": (10.0,), "contexts": (0, 8), "wall_ms": ()}, "rank 1: 1 decode steps of 3 asked for"),
        ({"decode_ms": (10.0, 0.0, 12.0)}, "rank 1: a step of no duration: the clock did not run"),
    ],
)
def test_a_fault_of_one_rank_is_one_of_all(changes: dict[str, object], message: str) -> None:
    faults = Measurement.slowest([GOOD, replace(GOOD, **changes)]).faults()  # type: ignore[arg-type]
    assert len(faults) == 1
    assert faults[0].startswith(message)


@pytest.mark.parametrize("odd", [12.5, float("nan"), float("inf")])
def test_a_file_holds_all_of_it(odd: float, tmp_path: Path) -> None:
    given = replace(GOOD, decode_ms=(10.0, odd, 12.0), of_ranks=("rank 3: odd",))
    write_json(tmp_path / "one.json", asdict(given))
    assert repr(Measurement.from_json(json.loads((tmp_path / "one.json").read_text()))) == repr(given)
