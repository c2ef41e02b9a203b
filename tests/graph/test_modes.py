"""The same tokens in every mode as on the CPU, over the whole ladder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.compat import CACHE_NAME
from tests.graph.support import LAYERS, build, generate, prompt, weights
from tests.unit.small import small_config
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
    assert bool(model.compiled_steps) is (name != "eager")
    for call, tokens in zip(calls, expected, strict=True):
        found = generate(model, prompt(device, **call), NEW_TOKENS)
        assert_same_tokens(found, tokens, reference, prompt("cpu", **call))


@pytest.mark.parametrize("mode", ["npugraph_ex", pytest.param("torchair", marks=pytest.mark.slow)])
def test_models_that_differ_in_a_constant_share_no_graph(mode: str, device: str) -> None:
    """Same code, same shapes, and no guard on the model: in npugraph_ex mode the same backend, too."""
    torch._dynamo.reset()
    models = []
    for epsilon in (1e-6, 3.0):
        config = small_config(num_hidden_layers=LAYERS, rms_norm_eps=epsilon)
        models.append(Qwen2ForCausalLM.from_state_dict(config, weights(), device=device))
    ids = prompt(device, 1, 9)["input_ids"]

    @torch.no_grad()
    def logits(model: Qwen2ForCausalLM) -> torch.Tensor:
        return model(ids, **{CACHE_NAME: model.allocate_cache(1, 9)}).logits.cpu()

    expected = [logits(model) for model in models]
    assert (expected[0] - expected[1]).abs().max() > 1
    for model in models:
        compile_model(model, mode)
    for model, eager in zip(models, expected, strict=True):
        assert (logits(model) - eager).abs().max() < 2e-4
