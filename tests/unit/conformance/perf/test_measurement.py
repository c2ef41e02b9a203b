"""What a measurement says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
