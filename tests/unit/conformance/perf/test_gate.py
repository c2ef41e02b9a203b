"""Verdicts on one row, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.gate import Against, Verdict, judge, limit_ms
from qwen2_npu.conformance.perf.measurement import Measurement, Summary
from qwen2_npu.conformance.perf.recorded import Baseline, protocol
from qwen2_npu.conformance.sizes import SIZES
from tests.perf.fake_runner import measurement_of

NUMBER = documented.by_id()["7b-ladder-b4-graph-fused_qkv-decode"]
CARD = HARDWARE[DOCUMENTED_SOC]


def measured(decode_ms: float = 24.0) -> Measurement:
    return measurement_of({"prefill": 345.0, "decode": decode_ms})


def baseline(*milliseconds: float) -> Baseline:
    runs = tuple(Summary(ms * 1.01, ms, ms * 1.2) for ms in milliseconds)
    return Baseline(NUMBER.row.id, "first", protocol(measured()), runs)


def verdict(measurement: Measurement, *, strict: bool = True, **against: object) -> Verdict:
    return judge(NUMBER.row, SIZES["7B"], measurement, Against(card=CARD, **against), strict=strict)  # type: ignore[arg-type]


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
