"""A measured rate beside the known one."""

from __future__ import annotations

from qwen2_npu.conformance.machine.bug_report.hardware_probes import _compared, _seconds


def test_within_and_beyond_what_is_known() -> None:
    within, beyond = _compared(0.7e12, 0.8e12, 1e12, "TB/s"), _compared(1.2e12, 0.8e12, 1e12, "TB/s")
    assert (within.as_assumed, within.text) == (True, "0.7 TB/s, 88% of the known 0.8")
    assert beyond.as_assumed is False
    assert _compared(1e12, None, 1e12, "TB/s").as_assumed is None


def test_the_fastest_of_several_runs_after_two_that_warm_up() -> None:
    calls: list[int] = []
    assert _seconds(lambda: calls.append(1), 3, "cpu") >= 0
    assert len(calls) == 5
