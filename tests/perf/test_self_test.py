"""The gate's self-test through the real measuring code: a two-layer model, generate, and a clock that shows what it is
told.

tests/perf/test_fail_closed.py does the same through pytest without a model. Nothing here is a latency of anything.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.documented import Documented
from qwen2_npu.conformance.perf.gate import Against, Verdict, judge, limit_ms
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.protocol import measure
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from tests.unit.small import small_config, small_stock, stock_weights

NUMBERS = documented.read()
INPUT_TOKENS, DECODE_STEPS = 4, 2
PAST = 1e-6


class ToldClock:
    """A timer (see qwen2_npu.conformance.machine.timers) of told latencies."""

    def __init__(self, kind: str, prefill_ms: float, decode_ms: float) -> None:
        self.told = [prefill_ms] + [decode_ms] * DECODE_STEPS
        self.started = self.stopped = 0

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def steps_ms(self) -> list[float]:
        assert self.started == self.stopped
        return self.told[: self.stopped]

    def wall_ms(self) -> list[float]:
        return []


@pytest.fixture(scope="module")
def two_layers() -> Any:
    torch.manual_seed(0)
    config = small_config(num_hidden_layers=2)
    return Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config)))


def told(two_layers: Any, milliseconds: float) -> Measurement:
    """A whole measurement, by a clock that shows ``milliseconds`` for every step."""
    clock = partial(ToldClock, prefill_ms=milliseconds, decode_ms=milliseconds)
    found = measure(two_layers, batch=1, input_tokens=INPUT_TOKENS, decode_steps=DECODE_STEPS, timer_for=clock)
    return replace(found, warnings=(), self_test=True)


def verdict(number: Documented, measurement: Measurement) -> Verdict:
    """``number``'s row. The protocol is shortened: told latencies have no length."""
    conditions = replace(number.conditions, input_tokens=INPUT_TOKENS, output_tokens=DECODE_STEPS + 1)
    shorter = replace(number, conditions=conditions)
    size = SIZES[number.row.configuration.model]
    against = Against(documented=shorter, transformers="4.37.0", card=HARDWARE[DOCUMENTED_SOC])
    return judge(number.row, size, measurement, against, strict=True, label=number.label)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.row.id)
def test_passes_at_the_documented_latency_and_fails_just_past_its_margin(number: Documented, two_layers: Any) -> None:
    at = verdict(number, told(two_layers, number.ms))
    assert at.passed, at
    past = verdict(number, told(two_layers, limit_ms(number) + PAST))
    (failure,) = past.failures
    assert failure.startswith("slower: mean ")
    assert str(past).startswith(f"SELF-TEST, injected latencies: row {number.row.id} ({number.label})")
