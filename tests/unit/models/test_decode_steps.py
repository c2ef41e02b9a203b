"""one_rotary and kv_scatter: fewer operators in a decode step, and the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.conformance.accuracy.intermediates import npu_operator
from qwen2_npu.models.layers import for_all_heads
from tests.unit.mixture import mixture_config
from tests.unit.small import V4, small_config, small_stock, stock_weights

ROWS, TOKENS, STEPS = 3, 9, 4

SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 64": {},
    "head_dim 128": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
}
BEFORE = Optimizations.up_to("last_layer")
AFTER = {
    "one_rotary": Optimizations.up_to("one_rotary"),
    "kv_scatter": Optimizations.up_to("kv_scatter"),
    "kv_scatter alone": BEFORE.replace(kv_scatter=True),
}


class Calls(TorchFunctionMode):
    """Counts calls of npu operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = npu_operator(func)
        if name is not None:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=SHAPES)
def weights(request: pytest.FixtureRequest) -> Any:
    if V4 and request.param == "sliding":
        pytest.skip("4.37.0 refuses it: see test_compat")
    stock = small_stock(small_config(**SHAPES[request.param]))
    return stock.config, stock_weights(stock)


def build(weights: Any, optimizations: Optimizations, dtype: torch.dtype = torch.float32) -> Any:
    return Qwen2ForCausalLM.from_state_dict(weights[0], weights[1], optimizations=optimizations).to(dtype)


@torch.no_grad()
def logits_of(model: Any, mask: torch.Tensor, **arguments: Any) -> tuple[list[torch.Tensor], Any]:
    """Of a prompt, a continuation of two tokens and decode steps; and the cache."""
    generator = torch.Generator().manual_seed(3)
    cache, found = model.allocate_cache(ROWS, 64), []
    for tokens in (TOKENS, 2, *[1] * STEPS):
        if found:
            mask = torch.cat((mask, mask.new_ones(ROWS, tokens)), dim=1)
        ids = torch.randint(1, 199, (ROWS, tokens), generator=generator)
        output = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **arguments)
        found.append(output.logits)
    return found, cache


MASKS = {
    "full": torch.ones(ROWS, TOKENS, dtype=torch.int64),
    "left": torch.tensor([[0] * cut + [1] * (TOKENS - cut) for cut in (0, 4, 7)]),
}


@pytest.mark.parametrize("step", AFTER)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_bits_as_before_in_logits_and_cache(weights: Any, step: str, mask: str, dtype: torch.dtype) -> None:
    before, after = (logits_of(build(weights, each, dtype), MASKS[mask]) for each in (BEFORE, AFTER[step]))
    # A product of two dimensions may add up in another order than one of three.
    exact = step == "one_rotary"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4 if dtype == torch.float32 else 0.05}
    for one, other in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    for name in ("key_cache", "value_cache"):
        for one, other in zip(getattr(before[1], name), getattr(after[1], name), strict=True):
            torch.testing.assert_close(one, other, **tolerance)


def calls_of_a_decode_step(model: Any) -> Calls:
    cache = model.allocate_cache(ROWS, 64)
    with torch.no_grad():
        model(torch.ones(ROWS, TOKENS, dtype=torch.int64), past_key_values=cache)
        with Calls() as calls:
            model(torch.ones(ROWS, 1, dtype=torch.int64), past_key_values=cache)
    return calls


def test_operators_of_a_decode_step(weights: Any) -> None:
    layers = weights[0].num_hidden_layers
    found = {step: calls_of_a_decode_step(build(weights, optimizations)) for step, optimizations in AFTER.items()}
    assert found["one_rotary"].counts["npu_rotary_mul"] == layers
    assert found["one_rotary"].counts["npu_apply_rotary_pos_emb"] == 0
    assert found["one_rotary"].counts["scatter_update_"] == 2 * layers
    for step in ("kv_scatter", "kv_scatter alone"):
        assert found[step].counts["npu_scatter_pa_kv_cache"] == layers
        assert found[step].counts["scatter_update_"] == 0


def test_products_of_a_decode_step_have_two_dimensions(weights: Any) -> None:
    seen: dict[str, set[int]] = {}
    for name, optimizations in (("before", BEFORE), ("after", AFTER["kv_scatter"])):
        model, dimensions = build(weights, optimizations), seen.setdefault(name, set())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, given, found=dimensions: found.add(given[0].dim()))
        cache = model.allocate_cache(ROWS, 64)
        with torch.no_grad():
            model(torch.ones(ROWS, TOKENS, dtype=torch.int64), past_key_values=cache)
            dimensions.clear()
            logits = model(torch.ones(ROWS, 1, dtype=torch.int64), past_key_values=cache).logits
        assert logits.shape == (ROWS, 1, weights[0].vocab_size)
    assert seen == {"before": {2, 3}, "after": {2}}


@torch.no_grad()
def test_hidden_states_of_a_decode_step_keep_their_shape(weights: Any) -> None:
    model = build(weights, Optimizations.all())
    cache = model.allocate_cache(ROWS, 64)
    model(torch.ones(ROWS, TOKENS, dtype=torch.int64), past_key_values=cache)
    output = model(torch.ones(ROWS, 1, dtype=torch.int64), past_key_values=cache, output_hidden_states=True)
    hidden = weights[0].hidden_size
    assert [tuple(each.shape) for each in output.hidden_states] == [(ROWS, 1, hidden)] * (
        model.config.num_hidden_layers + 1
    )
    assert model.get_decoder()(torch.ones(ROWS, 1, dtype=torch.int64)).last_hidden_state.shape == (ROWS, 1, hidden)


@torch.no_grad()
def test_rows_write_where_they_are_after_the_cache_has_grown(weights: Any) -> None:
    """Capacity is part of a slot's number."""
    model, other = build(weights, Optimizations.all()), build(weights, BEFORE)
    found = []
    for each in (model, other):
        cache = each.allocate_cache(ROWS, 16)
        each(torch.ones(ROWS, TOKENS, dtype=torch.int64), past_key_values=cache)
        cache.grow(300)
        assert cache.slots.tolist() == [row * 384 + TOKENS for row in range(ROWS)]
        found.append(each(torch.full((ROWS, 1), 7), past_key_values=cache).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(V4, reason="transformers 4.37.0 has no Qwen2Moe")
def test_a_mixture_decodes_as_before() -> None:
    config = mixture_config()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM.of_kind(config)(config, Optimizations.all()).eval()
    found = []
    for switched in (Optimizations.all(), Optimizations.all().replace(one_rotary=False, kv_scatter=False)):
        other = Qwen2ForCausalLM.of_kind(config)(config, switched).eval()
        other.load_state_dict(model.state_dict())
        found.append(logits_of(other, MASKS["left"])[0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_for_all_heads_leave_the_last_as_they_are(dtype: torch.dtype) -> None:
    angles = torch.randn(2, 1, 1, 8)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    states = torch.randn(2, 1, 6, 8).to(dtype)
    turned = torch.ops.npu.npu_rotary_mul(states, *for_all_heads(cos, sin, 4, 2), rotary_mode="half")
    expected = torch.ops.npu.npu_rotary_mul(states[:, :, :4].contiguous(), cos, sin, rotary_mode="half")
    assert torch.equal(turned[:, :, :4], expected)
    assert torch.equal(turned[:, :, 4:], states[:, :, 4:])
