"""A rank's own parts; with other ranks in test_launcher.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2_npu.conformance.perf.job import HANDING_IN, MEASURING, RESULT, Job, Ticket, statuses
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.perf.timers import HostTimer
from qwen2_npu.conformance.perf.worker import Rank, Together

JOB = Job(Configuration("72B", 2, 4, "graph", "fused_qkv"), "cpu", 8, 2, model_path="/models/Qwen2-72B")
GOOD = Measurement(100.0, (10.0, 10.0), (), (0, 8, 9), input_tokens=8, asked_steps=2, weights="Qwen2-72B")


def test_a_job_survives_json_and_names_its_weights() -> None:
    assert Job.from_json(json.loads(json.dumps(JOB.to_json()))) == JOB
    assert (JOB.weights, replace(JOB, model_path=None).weights) == ("Qwen2-72B", "random")
    other = replace(JOB, seed=1, configuration=replace(JOB.configuration, step="original"))
    assert JOB.differences(other.to_json()) == [
        "step: fused_qkv asked, original measured",
        "seed: 0 asked, 1 measured",
    ]


def test_only_the_first_step_waits_for_the_others() -> None:
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return 0.0

    timer = Together(HostTimer(lambda: events.append("synchronize"), clock), lambda: events.append("barrier"))
    for _ in range(2):
        timer.start()
        timer.stop()
    step = ["synchronize", "clock", "synchronize", "clock"]
    assert events == ["barrier", *step, *step]  # the barrier is over when the first clock is read
    assert (timer.steps_ms(), timer.wall_ms()) == ([0.0, 0.0], [])


def test_rank_0_writes_the_result_of_all(tmp_path: Path) -> None:
    ticket = Ticket("run", JOB)
    Rank(tmp_path, 1, 2).hand_in(ticket, replace(GOOD, prefill_ms=200.0))
    assert not (tmp_path / RESULT).exists()
    Rank(tmp_path, 0, 2).hand_in(ticket, GOOD)
    found = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
    assert Measurement.from_json(found["measurement"]) == replace(GOOD, prefill_ms=200.0)
    assert (found["run"], found["ranks"], Job.from_json(found["job"])) == ("run", 2, JOB)
    assert {rank: status.stage for rank, status in statuses(tmp_path).items()} == {0: HANDING_IN, 1: HANDING_IN}


def test_a_rank_whose_steps_are_none_of_the_protocol_hands_in_nothing(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="the KV cache does not grow by one token per step"):
        rank.hand_in(Ticket("run", JOB), replace(GOOD, contexts=(0, 8, 8)))
    assert not list(tmp_path.glob("measured-*"))


def test_a_rank_says_where_it_is(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 3, 8)
    rank.at(MEASURING)
    rank.at(rank.stage, "ValueError: no")
    (status,) = statuses(tmp_path).values()
    assert (status.rank, status.stage, status.error) == (3, MEASURING, "ValueError: no")
