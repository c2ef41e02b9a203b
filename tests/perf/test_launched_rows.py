"""Documented rows on eight cards, from pytest through the launcher to eight ranks and back to the gate.

A self-test: ranks tell the documented latencies (tests/perf/standin_rank.py). Nothing is measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.perf.subprocesses import Result, run_pytest

TABLE = "72b-ladder-b4-graph-fused_qkv"
PREFILL, DECODE = (f"test_latency[{TABLE}-{phase}]" for phase in ("prefill", "decode"))


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Result, int]:
    """The session, and how many launches it took."""
    count = tmp_path / "count"
    monkeypatch.setenv("LAUNCHED", json.dumps({"count": str(count), **settings}))
    result = run_pytest(tmp_path, "--gate", f"--gate-rows={TABLE}-*", plugins=("tests.perf.launched",))
    return result, len(count.read_text(encoding="utf-8").splitlines()) if count.exists() else 0


def test_one_launch_of_eight_ranks_serves_both_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, launches = run(tmp_path, monkeypatch)
    assert (result.status, result.failed, result.passed, launches) == (0, {}, 3, 1), result.output
    assert "SELF-TEST: latencies were injected" in result.output
    assert "compared with documented on Atlas 800I A2" in result.output


def test_live_rows_need_tensor_parallel_and_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, launches = run(tmp_path, monkeypatch, live=True)
    assert (result.status, launches) == (1, 0)
    reason = "needs tensor parallel: 72B runs on 8 cards"
    assert set(result.failed) == {PREFILL, DECODE, "every_row_was_judged"}
    assert f"row {TABLE}-decode was not run: {reason}" in result.failed[DECODE]
    assert f"2 rows not run: {reason}" in result.failed["every_row_was_judged"]


@pytest.mark.slow
def test_one_slow_rank_of_eight_is_the_rows_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run(tmp_path, monkeypatch, factors={"5": 1.2})
    assert set(result.failed) == {PREFILL, DECODE}
    assert "slower: mean" in result.failed[DECODE]
    assert "(+20.0%)" in result.failed[DECODE]


@pytest.mark.slow
def test_a_rank_that_dies_fails_both_rows_by_name_after_one_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, launches = run(tmp_path, monkeypatch, rank="raises")
    assert (result.status, launches) == (1, 1)
    reason = "rank 1 of 8 failed at 'measuring': RuntimeError: the card is on fire"
    for name in (PREFILL, DECODE):
        row = name.removeprefix("test_latency[").removesuffix("]")
        assert f"row {row}: {reason}" in result.failed[name]
        assert "in _raise" in result.failed[name]  # the rank's own traceback
    assert f"2 rows not run: {reason}" in result.failed["every_row_was_judged"]
    assert f"not run: 2 rows: {reason}" in result.output
