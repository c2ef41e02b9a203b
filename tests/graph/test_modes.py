"""The same tokens in every mode as on the CPU, over the whole ladder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, compile_model
from tests.graph.support import build, generate, prompt
from tests.unit.tokens import assert_same_tokens

MODES: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "torchair-static": {"mode": "torchair", "dynamic": False},
    "torchair-dynamic": {"mode": "torchair", "dynamic": True},
    "torchair-unfrozen": {"mode": "torchair", "frozen_parameter": False},
    "npugraph_ex": {"mode": "npugraph_ex"},
}

FAST = {
    ("eager", LADDER[-1]),
    ("npugraph_ex", "fused_qkv"),
    ("torchair-dynamic", "fused_qkv"),
    ("torchair-static", "fused_qkv"),
}

CASES = [
    pytest.param(name, step, marks=() if (name, step) in FAST else pytest.mark.slow)
    for name in MODES
    for step in LADDER
    # Live lengths in a static graph are refused: tests/unit/graph/test_npu.py.
    if not (name == "torchair-static" and Optimizations.up_to(step).ifa_tiling)
]

NEW_TOKENS = 12


@pytest.mark.parametrize(("name", "step"), CASES)
def test_tokens_are_the_cpus(name: str, step: str, device: str) -> None:
    optimizations = Optimizations.up_to(step)
    calls = [{"batch": 2, "tokens": 9}, {"batch": 2, "tokens": 9, "ragged": True}]
    reference = build("cpu", optimizations)
    expected = [generate(reference, prompt("cpu", **call), NEW_TOKENS) for call in calls]
    torch._dynamo.reset()
    model = compile_model(build(device, optimizations), **MODES[name])
    for call, tokens in zip(calls, expected, strict=True):
        found = generate(model, prompt(device, **call), NEW_TOKENS)
        assert_same_tokens(found, tokens, reference, prompt("cpu", **call))
