"""Verdicts on one row, case by case."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import documented, gate
from qwen2_npu.conformance.perf.gate import Against, LatencyComparison, Verdict, judge, limit_ms
from qwen2_npu.conformance.perf.measurement import Measurement, Summary
from qwen2_npu.conformance.perf.memory import MemoryFormula
from qwen2_npu.conformance.perf.recorded import Baseline, protocol
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import QUANTIZED
from tests.perf.fake_runner import measurement_of

NUMBER = documented.by_id()["7b-ladder-b4-graph-fused_qkv-decode"]
CARD = HARDWARE[DOCUMENTED_SOC]


def measured(decode_ms: float = 24.0) -> Measurement:
    return measurement_of({"prefill": 345.0, "decode": decode_ms})


def baseline(*milliseconds: float) -> Baseline:
    runs = tuple(Summary(ms * 1.01, ms, ms * 1.2) for ms in milliseconds)
    return Baseline(NUMBER.row.id, "first", protocol(measured()), runs)


def verdict(measurement: Measurement, *, strict: bool = True, **against: Any) -> Verdict:
    return judge(NUMBER.row, SIZES["7B"], measurement, Against(card=CARD, **against), strict=strict)


def test_documented_rows_fail_where_slower_alone() -> None:
    assert limit_ms(NUMBER) == pytest.approx(24 * 1.1 + 0.5)
    for ms, passed in ((19.0, True), (24.0, True), (26.9, True), (26.9001, False), (28.8, False)):
        assert verdict(measured(ms), documented=NUMBER).passed is passed, ms


def test_recorded_rows_fail_in_both_directions() -> None:
    recorded = baseline(24.0, 24.1, 23.9, 24.05, 23.95)
    steady = replace(measured(24.0), decode_ms=(24.0,) * 511 + (24.48,) * 512)  # median 24.48, mean 24.24
    steady = replace(steady, decode_ms=(24.0,) * 512 + (24.48,) * 511)  # median 24, mean 24.24: 1 % above, as recorded
    assert verdict(steady, recorded=recorded).passed
    slower = verdict(replace(steady, decode_ms=tuple(ms * 1.2 for ms in steady.decode_ms)), recorded=recorded)
    assert [failure.split(":")[0] for failure in slower.failures] == ["slower", "slower"]
    faster = verdict(replace(steady, decode_ms=tuple(ms * 0.9 for ms in steady.decode_ms)), recorded=recorded)
    assert all("update the baseline with --update-baselines=REASON" in failure for failure in faster.failures)
    assert len(faster.failures) == 2


def test_stalls_that_leave_the_median_alone_are_seen_by_the_mean() -> None:
    recorded = baseline(24.0, 24.1, 23.9, 24.05, 23.95)
    stalled = replace(measured(24.0), decode_ms=(24.0,) * 920 + (60.0,) * 103)
    (failure,) = verdict(stalled, recorded=recorded).failures
    assert failure.startswith("slower: mean 27.6")


def test_below_the_floor_is_a_timing_error_whatever_the_baseline() -> None:
    for against in ({"documented": NUMBER}, {}):
        failures = verdict(measured(17.0), **against).failures  # the weights alone take 17.7 ms
        assert failures[0].startswith("timing error: 17 ms is below the physical floor of 18.")


def test_an_unknown_card_is_a_gap() -> None:
    against = Against(documented=NUMBER, transformers="4.37.0", why_no_card="nothing is known of it")
    assert judge(NUMBER.row, SIZES["7B"], measured(), against, strict=False).passed
    strict = judge(NUMBER.row, SIZES["7B"], measured(), against, strict=True)
    assert strict.failures == ["no physical floor: nothing is known of it"]


def test_no_baseline() -> None:
    assert verdict(measured(), strict=False).passed
    (failure,) = verdict(measured(), elsewhere=["X has 24 ms and differs in soc: X → Y"]).failures
    assert failure.startswith("no baseline to compare with: record 5 runs")
    assert "X has 24 ms" in failure


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((24.0, 24.1, 23.9), "3 of 5 runs recorded for 'first'"),
        ((24.0,) * 5, "no clock repeats itself"),
        ((24.0, 24.1, 23.9, 24.05, 0.0), "a placeholder"),
        ((24.0, 27.0, 21.0, 25.0, 23.0), "no gate"),
        ((1.0, 1.01, 0.99, 1.0, 1.001), "recorded baseline of 1 ms is below the physical floor"),
    ],
    ids=["too_few", "identical", "zero", "too_noisy", "below_the_floor"],
)
def test_a_recorded_baseline_that_is_none_fails(runs: tuple[float, ...], message: str) -> None:
    failures = verdict(measured(), recorded=baseline(*runs)).failures
    assert any(message in failure for failure in failures), failures


def test_an_unfinished_recording_does_not_spoil_a_documented_row() -> None:
    result = verdict(measured(), documented=NUMBER, recorded=baseline(24.0, 24.1))
    assert result.passed
    assert any("2 of 5 runs" in note for note in result.notes)


def test_another_protocol_is_another_quantity() -> None:
    other = replace(baseline(24.0, 24.1, 23.9, 24.05, 23.95), protocol={**protocol(measured()), "decode_steps": 64})
    (failure, *_) = verdict(measured(), recorded=other).failures
    assert "decode_steps: 64 recorded, 1023 now" in failure


def test_a_shorter_run_is_no_match_for_a_documented_decode() -> None:
    shorter = replace(measured(), asked_steps=8, decode_ms=(24.0,) * 8, contexts=(0, *range(1024, 1032)))
    assert verdict(shorter, strict=False, documented=NUMBER).passed
    assert "a shorter context is less work" in verdict(shorter, documented=NUMBER).failures[0]
    prefill = documented.by_id()["7b-ladder-b4-graph-fused_qkv-prefill"]
    against = Against(documented=prefill, transformers="4.37.0", card=CARD)
    assert judge(prefill.row, SIZES["7B"], shorter, against, strict=True).passed  # its context is the whole prompt


def test_host_warnings_and_faults() -> None:
    warned = replace(measured(), warnings=("governor powersave",))
    assert verdict(warned, strict=False, documented=NUMBER).passed
    assert verdict(warned, documented=NUMBER).failures == ["host: governor powersave"]
    ended = replace(measured(), decode_ms=())
    assert "generation ended early" in verdict(ended, strict=False, documented=NUMBER).failures[0]


def test_the_message_names_row_label_and_self_test() -> None:
    failed = judge(
        NUMBER.row,
        SIZES["7B"],
        measured(30.0),
        Against(documented=NUMBER, transformers="4.37.0", card=CARD),
        strict=True,
        label=NUMBER.label,
    )
    assert str(failed).splitlines() == [
        "SELF-TEST, injected latencies: row 7b-ladder-b4-graph-fused_qkv-decode (qkv融合): "
        "7B, batch 4, graph, fused_qkv, decode",
        "  slower: mean 30 ms against 24 ms documented on Atlas 800I A2, SKU unknown (+25.0%), limit 26.9 ms",
    ]


# ---- each rule alone ------------------------------------------------------------------------------------------------
PREFILL = documented.by_id()["7b-ladder-b4-graph-fused_qkv-prefill"]
RECORDED = (24.0, 24.1, 23.9, 24.05, 23.95)


@pytest.mark.parametrize(
    ("measured_ms", "failure"),
    [
        (9.0, None),
        (math.nextafter(9.0, 0), "faster: mean 9 ms against 10 ms somewhere (-10.0%), limit 9 ms: update the baseline"),
        (11.0, None),
        (math.nextafter(11.0, 12), "slower: mean 11 ms against 10 ms somewhere (+10.0%), limit 11 ms"),
    ],
)
def test_a_limit_itself_passes_and_the_next_number_does_not(measured_ms: float, failure: str | None) -> None:
    said = LatencyComparison("somewhere", "mean", measured_ms, 10.0, low=9.0, high=11.0).failure
    assert said == failure if failure is None else said is not None and said.startswith(failure)
    one_sided = LatencyComparison("somewhere", "mean", measured_ms, 10.0, low=None, high=11.0).failure
    assert (one_sided is None) == (measured_ms <= 11.0)


@pytest.mark.parametrize("statistic", ["median", "mean"])
@pytest.mark.parametrize("side", ["low", "high"])
def test_each_figure_of_a_recorded_row_is_held_against_its_own_margin(statistic: str, side: str) -> None:
    recorded = baseline(*RECORDED)  # the means are 1 % above the medians
    limit = getattr(recorded.interval(statistic), side)
    away = {"low": 1 - 1e-7, "high": 1 + 1e-7}[side]
    for ms, passed in ((limit / away, True), (limit * away, False)):
        figures = {name: recorded.interval(name).centre for name in ("median", "mean")} | {statistic: ms}
        other = (1023 * figures["mean"] - 512 * figures["median"]) / 511
        steps = (figures["median"],) * 512 + (other,) * 511
        found = verdict(replace(measured(), decode_ms=steps), recorded=recorded)
        assert found.passed is passed
        kind = {"low": "faster", "high": "slower"}[side]
        assert [failure.split(" ms")[0] for failure in found.failures] == [
            f"{kind}: {statistic} {ms:.4g}" for _ in range(not passed)
        ]


@pytest.mark.parametrize("key", ["input_tokens", "decode_steps", "weights"])
@pytest.mark.parametrize("more", [True, False])
def test_each_part_of_the_protocol_must_be_the_same(key: str, more: bool) -> None:
    """Random weights beside real ones, a longer prompt beside a shorter one: not compared, and only that is named."""
    now = protocol(measured())
    other = {"weights": ("Qwen2-7B", "a checkpoint")[more], **{name: now[name] + (1 if more else -1) for name in
             ("input_tokens", "decode_steps")}}  # fmt: skip
    recorded = replace(baseline(*RECORDED), protocol={**now, key: other[key]})
    text = f"recorded by another protocol ({key}: {other[key]} recorded, {now[key]} now): not compared"
    found = verdict(measured(), recorded=recorded)
    assert found.failures[0] == text
    assert not found.comparisons
    lenient = verdict(measured(), recorded=recorded, strict=False)
    assert lenient.passed
    assert lenient.notes[0] == text
    beside = verdict(measured(), recorded=recorded, documented=NUMBER)  # a documented row needs no other
    assert beside.passed
    assert beside.notes == [text]


def test_an_unfinished_recording_is_a_note_without_the_gate() -> None:
    found = verdict(measured(), recorded=baseline(24.0, 24.1), strict=False)
    assert found.passed
    assert found.notes[0].startswith("2 of 5 runs recorded for 'first'")


def test_the_mean_of_a_prefill_is_not_compared_twice() -> None:
    recorded = Baseline(
        PREFILL.row.id, "first", protocol(measured()), tuple(Summary(m, m, m) for m in (345, 344, 346, 345.5, 344.5))
    )
    found = judge(PREFILL.row, SIZES["7B"], measured(), Against(card=CARD, recorded=recorded), strict=True)
    assert [comparison.statistic for comparison in found.comparisons] == ["median"]
    assert found.passed


def test_without_a_card_a_recorded_row_is_judged_all_the_same() -> None:
    against = Against(recorded=baseline(*RECORDED))
    steady = replace(measured(), decode_ms=(24.0,) * 512 + (24.48,) * 511)
    assert judge(NUMBER.row, SIZES["7B"], steady, against, strict=True).passed
    found = judge(NUMBER.row, SIZES["7B"], measured(5.0), against, strict=True)
    assert found.floor_ms is None
    assert [failure.split(":")[0] for failure in found.failures] == ["faster", "faster"]


def test_the_floor_itself_is_no_timing_error() -> None:
    one_step = replace(measured(), asked_steps=1, decode_ms=(24.0,), contexts=(0, 1024))
    floor = verdict(one_step, strict=False).floor_ms
    assert floor is not None
    for ms, passed in ((floor, True), (math.nextafter(floor, 0), False)):
        failures = verdict(replace(one_step, decode_ms=(ms,)), strict=False).failures
        assert [failure.split(":")[0] for failure in failures] == ["timing error"] * (not passed)


def test_a_recorded_baseline_on_the_floor_is_one() -> None:
    recorded = baseline(*RECORDED)
    centre = recorded.interval("median").centre
    floor = verdict(measured()).floor_ms
    assert floor is not None
    for factor, passed in ((1 + 1e-9, True), (1 - 1e-9, False)):
        scaled = baseline(*(run * floor / centre * factor for run in RECORDED))
        failures = verdict(replace(measured(), decode_ms=(floor * 1.005,) * 1023), recorded=scaled).failures
        assert any("is below the physical floor" in failure for failure in failures) is not passed


def test_a_recorded_baseline_of_exactly_the_floor_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = baseline(*RECORDED)
    for away, passed in ((0, True), (100, False)):
        floor = math.nextafter(recorded.interval("median").centre, away) if away else recorded.interval("median").centre
        monkeypatch.setattr(gate, "_floor_ms", lambda *_, floor=floor: floor)
        steady = replace(measured(), decode_ms=(24.0,) * 512 + (24.48,) * 511)
        assert verdict(steady, recorded=recorded).passed is passed


FORMULA = MemoryFormula(weights=14_000_000_000, cache=500_000_000, tables=0, activations=0)


@pytest.mark.parametrize(
    ("peak", "failure"),
    [
        (FORMULA.total, ""),
        (FORMULA.total - 1, "memory: peak 14,500.0 MB is below 14,500.0"),
        (10**11, "memory: peak 100,000.0 MB is above"),
        (None, "memory: the device did not say what its peak was"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_the_memory_of_prefill_is_held_against_the_formula(peak: int | None, failure: str, strict: bool) -> None:
    against = Against(documented=PREFILL, transformers="4.37.0", card=CARD, memory=FORMULA)
    found = judge(PREFILL.row, SIZES["7B"], replace(measured(), peak_bytes=peak), against, strict=strict)
    said = found.failures if strict or peak is not None else found.notes
    assert [text[: len(failure)] for text in said] == [failure] * bool(failure)
    assert found.passed is (not failure or (peak is None and not strict))
    decode = judge(
        NUMBER.row,
        SIZES["7B"],
        replace(measured(), peak_bytes=peak),
        replace(against, documented=NUMBER),
        strict=strict,
    )
    assert decode.passed, "the peak is in prefill, and said once"


def test_all_warnings_and_notes_are_said() -> None:
    warned = replace(measured(), warnings=("governor powersave", "busy host"))
    assert verdict(warned, documented=NUMBER).failures == ["host: governor powersave", "host: busy host"]
    noted = documented.by_id()["72b-ladder-b4-graph-fused_qkv-decode"]
    found = judge(noted.row, SIZES["72B"], measured(38.0), Against(documented=noted), strict=True)
    assert found.notes == [noted.note]
    assert str(found).splitlines()[-1] == f"  note: {noted.note}"


def test_the_stock_model_of_another_version_is_named_and_not_compared() -> None:
    original = documented.by_id()["7b-ladder-b4-graph-original-decode"]
    against = Against(documented=original, transformers="5.24.0", card=CARD)
    found = judge(original.row, SIZES["7B"], measured(100.0), against, strict=False)
    assert found.passed
    assert not found.comparisons
    assert found.notes[0].startswith("shown as stock-5.x: the documented 44 ms are of the model of transformers 4.37.0")


def test_a_measurement_without_samples_has_its_faults_and_no_figures() -> None:
    found = verdict(replace(measured(), decode_ms=()), documented=NUMBER)
    assert (found.summary, found.floor_ms, found.comparisons) == (Summary(0.0, 0.0, 0.0), None, [])
    assert not found.passed


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_floor_of_8_bit_weights_is_that_of_their_bytes(scheme: str) -> None:
    """17.7 ms are the floor of the 7B's bf16 weights, which these do not have to reach."""
    row = replace(NUMBER.row, configuration=replace(NUMBER.row.configuration, step=scheme))
    found = judge(row, SIZES["7B"], measured(15.0), Against(card=CARD), strict=False)
    assert found.failures == []
    assert found.floor_ms == pytest.approx(9.9, abs=0.1)
    found = judge(row, SIZES["7B"], measured(9.0), Against(card=CARD), strict=False)
    assert [failure.split(":")[0] for failure in found.failures] == ["timing error"]
