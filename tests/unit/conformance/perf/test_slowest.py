"""One measurement of several ranks'."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.slowest import slowest

ZERO = Measurement(
    prefill_ms=100.0,
    decode_ms=(10.0, 12.0, 10.0),
    wall_ms=(100.5, 10.5, 12.5, 10.5),
    contexts=(0, 8, 9, 10),
    input_tokens=8,
    asked_steps=3,
    peak_bytes=1000,
    warnings=("busy",),
)
ONE = replace(ZERO, prefill_ms=101.0, decode_ms=(11.0, 11.0, 11.0), wall_ms=(101.1, 11.1, 11.2, 11.3), peak_bytes=1100)


def test_every_step_is_the_slowest_rank_s_with_both_of_its_clocks() -> None:
    assert slowest([ZERO, ONE]) == replace(
        ZERO,
        prefill_ms=101.0,
        decode_ms=(11.0, 12.0, 11.0),
        wall_ms=(101.1, 11.1, 12.5, 11.3),
        peak_bytes=1100,
        warnings=("rank 0: busy", "rank 1: busy"),
    )
    assert slowest([replace(ZERO, warnings=())]) == replace(ZERO, warnings=())


def test_memory_that_one_card_does_not_say_is_not_said() -> None:
    assert slowest([ZERO, replace(ONE, peak_bytes=None)]).peak_bytes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": (0, 8, 8, 8)}, "rank 1 has contexts"),
        ({"asked_steps": 2}, "rank 1 has asked_steps=2, rank 0 has 3"),
        ({"self_test": True}, "rank 1 has self_test=True"),
        ({"weights": "other"}, "rank 1 has weights=other"),
        ({"decode_ms": (1.0, 1.0)}, "rank 1 timed 3 steps, rank 0 4"),
        ({"wall_ms": ()}, "rank 1 timed 4 steps"),
    ],
)
def test_ranks_that_did_not_do_the_same_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slowest([ZERO, replace(ONE, **changes)])  # type: ignore[arg-type]
