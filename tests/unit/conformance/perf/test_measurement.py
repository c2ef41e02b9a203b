"""What a measurement says of itself."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.perf.measurement import INPUT_TOKENS, OUTPUT_TOKENS, Measurement, Summary, _first_difference

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


# ---- each rule alone ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"decode_ms": (10.0, 11.0, 12.0, 13.0), "contexts": (0, 8, 9, 10, 11), "wall_ms": ()}, "4 decode steps of 3"),
        ({"decode_ms": (10.0, 11.0), "contexts": (0, 8, 9), "wall_ms": ()}, "2 decode steps of 3"),
    ],
)
def test_one_step_more_or_fewer_is_a_fault_alone(changes: dict[str, object], count: str) -> None:
    (fault,) = replace(GOOD, **changes).faults()  # type: ignore[arg-type]
    assert fault.startswith(f"{count} asked for")


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("by", [1, -1])
def test_one_token_more_or_fewer_in_the_cache_is_a_fault_at_each_step(step: int, by: int) -> None:
    contexts = list(GOOD.contexts)
    contexts[step] += by
    (fault,) = replace(GOOD, contexts=tuple(contexts)).faults()
    assert f"before step {step} it holds {contexts[step]} tokens, not {GOOD.contexts[step]}" in fault
    (fault,) = replace(GOOD, contexts=(*GOOD.contexts, 11)).faults()
    assert "before step 4 it holds 11 tokens, not None" in fault


@pytest.mark.parametrize("odd", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("step", range(4))
def test_a_duration_that_is_none_is_a_fault_at_each_step(odd: float, step: int) -> None:
    samples = [GOOD.prefill_ms, *GOOD.decode_ms]
    samples[step] = odd
    (fault,) = replace(GOOD, prefill_ms=samples[0], decode_ms=tuple(samples[1:]), wall_ms=()).faults()
    assert fault == "a step of no duration: the clock did not run"
    assert replace(GOOD, prefill_ms=5e-324, wall_ms=()).faults() == []


@pytest.mark.parametrize("step", range(4))
def test_the_host_s_clock_may_show_nine_tenths_of_the_device_s_at_each_step(step: int) -> None:
    device = (GOOD.prefill_ms, *GOOD.decode_ms)[step]
    for wall, faults in ((0.9 * device, 0), (math.nextafter(0.9 * device, 0), 1)):
        times = list(GOOD.wall_ms)
        times[step] = wall
        found = replace(GOOD, wall_ms=tuple(times)).faults()
        assert [fault.split(":")[0] for fault in found] == [f"step {step}"] * faults
    both = replace(GOOD, wall_ms=(0.0,) * 4).faults()
    assert len(both) == 1, "the first is enough"


def test_ranks_are_held_apart_whichever_is_slower() -> None:
    slow = replace(
        GOOD, prefill_ms=200.0, decode_ms=(30.0, 30.0, 30.0), peak_bytes=10, wall_ms=(200.0, 30.0, 30.0, 30.0)
    )
    for ranks in ([GOOD, slow], [slow, GOOD]):
        found = Measurement.slowest(ranks)
        assert (found.prefill_ms, found.decode_ms, found.peak_bytes, found.wall_ms) == (200.0, (30.0,) * 3, 1000, ())
        assert found.faults() == []
    faulty = replace(GOOD, asked_steps=4, prefill_ms=0.0, wall_ms=())
    assert [fault.split(":")[0] for fault in Measurement.slowest([faulty, GOOD, faulty]).faults()] == [
        "rank 0", "rank 0", "rank 2", "rank 2",
    ]  # fmt: skip
    for ranks in ([GOOD, replace(GOOD, peak_bytes=None)], [replace(GOOD, peak_bytes=None), GOOD]):
        assert Measurement.slowest(ranks).peak_bytes is None


def test_json_keeps_latencies_as_floats() -> None:
    content = json.loads(json.dumps(asdict(replace(GOOD, prefill_ms=100, decode_ms=(10, 11, 12)))))
    found = Measurement.from_json(content)
    assert [type(ms) for ms in (found.prefill_ms, *found.decode_ms)] == [float] * 4
    assert found == GOOD


def test_the_guide_s_protocol_and_the_plain_measurement() -> None:
    assert (INPUT_TOKENS, OUTPUT_TOKENS) == (1024, 1024)
    plain = Measurement(1.0, (1.0,), (), (0, 8), 8, 1)
    assert (plain.weights, plain.self_test, plain.warnings, plain.of_ranks) == ("random", False, (), ())


def test_what_ranks_do_not_time_is_the_first_one_s() -> None:
    found = Measurement.slowest([replace(GOOD, weights="a checkpoint"), replace(GOOD, weights="random")])
    assert (found.weights, found.input_tokens, found.asked_steps) == ("a checkpoint", 8, 3)


def test_equal_sequences_have_no_first_difference() -> None:
    with pytest.raises(AssertionError, match="called on equal sequences"):
        _first_difference((0, 8), (0, 8))
