"""Rows on several cards, measured in jobs of two ranks with a small model: on the CPU and on emulated cards.

Nothing here is a latency of anything, and nothing is compared.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen2_npu import emulator
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.children import run_to_end
from qwen2_npu.conformance.jobs import ROOT, JobError
from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.perf.runner import DeviceRunner, Request
from qwen2_npu.conformance.perf.session import EVERY_ROW, GateOptions, LatencyGate
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.parallel import job
from tests.perf.small_ranks import SLOWER_MS, SMALL, TOKENS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

STEPS = 3
MARK = "tests.perf.small_ranks"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SIZES, SMALL.name, SMALL)
    yield
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            left += [process.cmdline()] if MARK in process.cmdline() else []
    assert not left


def runner(device: str) -> DeviceRunner:
    found = DeviceRunner(Request(device, decode_steps=STEPS))
    found.rank_module = MARK
    return found


def measured(device: str, mode: Any, step: str) -> tuple[DeviceRunner, Configuration, Measurement]:
    if device == "npu" and not emulator.is_active():
        pytest.skip("there are no emulated cards here")
    measuring, configuration = runner(device), Configuration(SMALL.name, 2, 2, mode, step)
    assert measuring.why_not(configuration) is None
    return measuring, configuration, measuring.measured(configuration)


@pytest.mark.parametrize(
    ("device", "mode", "step"),
    [
        ("cpu", "eager", "fused_qkv"),
        ("cpu", "eager", "original"),
        ("npu", "eager", "original"),
        ("npu", "graph", "swiglu"),
        ("npu", "graph", "original"),
    ],
)
def test_the_slowest_rank_counts_and_nothing_is_compared(
    device: str, mode: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKS_FAULT", "slow")
    monkeypatch.setenv("RANKS_FAULTY", "1")  # rank 0 alone hands the result back
    measuring, configuration, found = measured(device, mode, step)
    assert found.faults() == []
    assert (len(found.decode_ms), found.input_tokens, found.weights) == (STEPS, TOKENS, "random")
    assert min(found.prefill_ms, *found.decode_ms) > SLOWER_MS, "the times of a rank that waited for nobody"
    assert (found.peak_bytes is None) == (device == "cpu")
    where = Where.CPU if device == "cpu" else Where.EMULATED
    assert measuring.fingerprint.where is where
    gate = LatencyGate(GateOptions(strict=True, scope=EVERY_ROW, reason=None, parallel=False), measuring)
    reason = gate.why_not_configuration(configuration, documented_row=True)
    assert reason is not None
    assert reason.startswith("not comparable: needs an Atlas 800I A2")


@pytest.mark.parametrize(
    ("fault", "cause", "seconds"),
    [
        ("raises", "this is the cause", 40),
        ("is killed", r"rank 1 (ended without a word: killed|was killed by SIGKILL)", 40),  # by whoever sees it first
        ("hangs", "rank 1 did not take part in a collective within 8 s", 60),
    ],
)
def test_a_rank_that_fails_is_one_message_and_leaves_nothing(
    fault: str, cause: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANKS_FAULT": fault, "RANKS_FAULTY": "1", "QWEN2_NPU_TIMEOUT": "8"}.items():
        monkeypatch.setenv(name, value)
    since = time.monotonic()
    with pytest.raises(JobError) as failed:
        measured("cpu", "eager", "swiglu")
    assert re.match(f"small on 2 cards, batch 2, eager, swiglu: {cause}", str(failed.value))
    assert "\n" not in str(failed.value)
    assert time.monotonic() - since < seconds


def test_a_job_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANKS_FAULT": "hangs", "RANKS_FAULTY": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(DeviceRunner, "job_seconds", 12.0)
    with pytest.raises(JobError, match="the ranks did not end within 12 s"):
        measured("cpu", "eager", "swiglu")


def test_more_ranks_than_cards_is_one_message() -> None:
    """Asked before the job is started, and again by the ranks: cards may be another program's by then."""
    if not emulator.is_active():
        pytest.skip("there are no emulated cards here")
    cards = emulator.settings().device_count
    measuring, configuration = runner("npu"), Configuration(SMALL.name, cards + 1, 1, "eager", "swiglu")
    assert measuring.why_not(configuration) == f"needs {cards + 1} cards of this kind: npu has {cards}"


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_bench_under_a_launcher(device: str, tmp_path: Path) -> None:
    """Rank 0 alone prints; the file says how many cards, and where."""
    if device == "npu" and not emulator.is_active():
        pytest.skip("there are no emulated cards here")
    path = tmp_path / "bench.json"
    arguments = ["bench", "--model-path", str(tiny.path()), "--device", device, "--batch", "1", "--json", str(path)]
    arguments += ["--input-len", "8", "--output-len", "4", "--steps", "original,swiglu"]
    status, output = run_to_end(
        job.command("qwen2_npu", arguments, 2), 120, cwd=ROOT, env=job.environment(device) | {"COLUMNS": "150"}
    )
    text = "\n".join(output)
    assert status == 0, text
    assert text.count("Every step is that of the slowest of 2 ranks.") == text.count("on 2 cards") == 1
    content = json.loads(path.read_text())
    assert [(r["step"], r["cards"], r["documented_decode_ms"]) for r in content["results"]] == [
        ("original", 2, None),
        ("swiglu", 2, None),
    ]
    assert content["provenance"]["verified"].startswith("cpu" if device == "cpu" else "emulated")
