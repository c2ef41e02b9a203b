"""Launches and KV reads of eager steps, exact on any machine: what single-operator latency is made of.

The guide's tables show it: fused_qkv costs eager mode time (7B prefill 361 -> 366 ms), because its three parts are
copied apart: one launch more per layer here, too. A change in either direction fails; correct the table where it is
meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen2_npu.compat import LOGITS_IN_FLOAT32
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import Size
from qwen2_npu.models.layers import RMSNorm
from tests.perf.counts import Counts, count_step

pytestmark = pytest.mark.perf

SMALL = Size("small", 256, 96, 2, 4, 2, 64, 199, tied=False)
BATCH, PROMPT, CAPACITY = 2, 16, 128

# step -> (launches per layer, launches of the rest) in prefill and in decode, head_dim 64
LAUNCHES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "fixed_kv_cache": ((54, 21), (50, 14)),
    "flash_attention": ((32, 23), (32, 16)),
    "add_rms_norm": ((16, 16), (16, 9)),
    "last_token_logits": ((16, 13), (16, 9)),
    "fused_qkv": ((17, 13), (17, 9)),
    "ifa_tiling": ((17, 13), (17, 8)),
    "fused_gate_up": ((16, 13), (16, 8)),
    "swiglu": ((15, 13), (15, 8)),
    "last_layer": ((15, 19), (15, 8)),
    "one_rotary": ((15, 19), (14, 15)),
    "kv_scatter": ((15, 19), (13, 16)),
}


def build(step: str, layers: int, **shape: int) -> Any:
    size = replace(SMALL, layers=layers, **shape)
    return Weights(size).build(Configuration("small", 1, BATCH, "eager", step), "cpu")


def count(model: Any, phase: str) -> Counts:
    return count_step(model, batch=BATCH, prompt=PROMPT, phase=phase)


@pytest.mark.parametrize("step", LAUNCHES)
def test_launches_are_exactly_these(step: str) -> None:
    models = [build(step, layers) for layers in (2, 3)]
    for phase, (per_layer, rest) in zip(("prefill", "decode"), LAUNCHES[step], strict=True):
        expected = (per_layer, rest + LOGITS_IN_FLOAT32)  # 4.37 casts the logits
        two, three = (count(model, phase).total for model in models)
        assert (three - two, 3 * two - 2 * three) == expected, f"{step}, {phase}: {count(models[0], phase).launches}"


def test_the_fused_rotary_operator_saves_a_launch_per_layer() -> None:
    shapes = ({"heads": 4, "kv_heads": 2, "head_dim": 64}, {"heads": 2, "kv_heads": 1, "head_dim": 128})
    narrow, wide = (count(build("swiglu", 2, **shape), "decode") for shape in shapes)
    assert narrow.total - wide.total == 2


@pytest.mark.parametrize(("step", "tokens"), [("flash_attention", CAPACITY), ("ifa_tiling", PROMPT + 1)])
def test_attention_reads_the_whole_cache_until_it_is_told_the_live_length(step: str, tokens: int) -> None:
    assert count(build(step, 3), "decode").kv_tokens == 3 * BATCH * tokens


# ---- faults -------------------------------------------------------------------------------------------------------
def _whole_cache(model: Any) -> None:
    for layer in model.model.layers:
        right = layer.self_attn._incremental_attention
        layer.self_attn._incremental_attention = lambda *given, right=right: right(*given[:-1], None)


def _unfused_norms(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.fused = False


def _rotary_table_in_every_layer(model: Any) -> None:
    for layer in model.model.layers:
        right = layer.self_attn.forward

        def forward(hidden_states: Any, phase: Any, inputs: Any, cos_sin: Any, *rest: Any, right: Any = right) -> Any:
            return right(hidden_states, phase, inputs, model.model.rotary(inputs.position_ids, head_axis=2), *rest)

        layer.self_attn.forward = forward


def _unfused_swiglu(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.swiglu = False


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_unfused_norms, "npu.npu_add_rms_norm: 0, 4 expected"),
        (_rotary_table_in_every_layer, "aten.embedding: 7, 3 expected"),
        (_unfused_swiglu, "aten.silu: 2, 0 expected"),
    ],
    ids=["unfused_norms", "rotary_table_in_every_layer", "unfused_swiglu"],
)
def test_unfused_operators_are_seen(fault: Callable[[Any], None], message: str) -> None:
    model = build("swiglu", 2)
    expected = count(model, "decode")
    assert count(model, "decode").difference(expected) == ""
    fault(model)
    assert message in count(model, "decode").difference(expected)


def test_a_cache_attended_at_its_full_length_is_seen() -> None:
    model = build("swiglu", 2)
    expected = count(model, "decode")
    _whole_cache(model)
    wanted = f"KV tokens read: {2 * BATCH * CAPACITY}, {2 * BATCH * (PROMPT + 1)} expected"
    assert count(model, "decode").difference(expected) == wanted


def test_counting_leaves_results_alone() -> None:
    model = build("swiglu", 2)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    before = model(tokens).logits
    count(model, "decode")
    assert torch.equal(model(tokens).logits, before)
