"""The last layer of a prefill on the kept positions alone: the same logits and the same cache, with less computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.graph import inductor
from tests.unit.small import V4, small_config, small_stock, stock_weights

TOLERANCE = 2e-4
"""As in test_qwen2."""

SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 64": {},
    "head_dim 128": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
}
VARIANTS = {
    "all": Optimizations.all(),
    "only": Optimizations.only("last_layer"),
    "fused_infer_attention": Optimizations.all().replace(fused_infer_attention=True),
}


@pytest.fixture(scope="module", params=SHAPES)
def weights(request: pytest.FixtureRequest) -> Any:
    if V4 and request.param == "sliding":
        pytest.skip("4.37.0 refuses it: see test_compat")
    stock = small_stock(small_config(**SHAPES[request.param]))
    return stock.config, stock_weights(stock)


def build(weights: Any, optimizations: Optimizations) -> Any:
    return Qwen2ForCausalLM.from_state_dict(weights[0], weights[1], optimizations=optimizations)


def computed(model: Any) -> list[tuple[int, ...]]:
    """Rows, and tokens of each, that the MLP of each layer is given from now on."""
    shapes: list[tuple[int, ...]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda _, given: shapes.append((len(given[0]), given[0].shape[:-1].numel() // len(given[0])))
        )
    return shapes


def ids_of(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 199, (3, tokens), generator=torch.Generator().manual_seed(seed))


MASKS = {
    "full": torch.ones(3, 12, dtype=torch.int64),
    "left": torch.tensor([[0] * cut + [1] * (12 - cut) for cut in (0, 4, 7)]),
    "right": torch.tensor([[1] * (12 - cut) + [0] * cut for cut in (0, 4, 7)]),
    "holes": torch.tensor([[1] * 3 + [0] * cut + [1] * (9 - cut) for cut in (0, 4, 7)]),
}


def largest_difference(first: Any, second: Any) -> float:
    """Between what two caches hold."""
    pairs = zip(first.key_cache + first.value_cache, second.key_cache + second.value_cache, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", MASKS)
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 7, 7, 2])], ids=["one", "three", "any"])
def test_same_logits_and_cache_in_a_prompt_its_continuation_and_a_decode_step(
    weights: Any, variant: str, rows: str, keep: int | torch.Tensor
) -> None:
    windowed = weights[0].use_sliding_window
    if windowed and rows in ("right", "holes"):
        pytest.skip("padding between tokens is refused where a window may reach across it: see test_inputs")
    before, after = (build(weights, VARIANTS[variant].replace(last_layer=on)) for on in (False, True))
    caches = before.allocate_cache(3, 32), after.allocate_cache(3, 32)
    shapes = computed(after)
    mask = MASKS[rows]
    kept = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    for seed, tokens in enumerate((12, 8, 1)):
        if seed > 0:
            mask = torch.cat((mask, mask.new_ones(3, tokens)), dim=1)
        if tokens == 8 and not windowed:
            mask[1, 15] = 0
        given = {"input_ids": ids_of(tokens, seed), "attention_mask": mask, "logits_to_keep": keep if tokens > 1 else 1}
        expected = before(past_key_values=caches[0], **given).logits
        found = after(past_key_values=caches[1], **given).logits
        live = mask[:, -tokens:][:, kept if tokens > 1 else slice(-1, None)] != 0
        assert (found - expected)[live].abs().max() < TOLERANCE
        assert largest_difference(*caches) < TOLERANCE
    count = torch.arange(12)[kept].numel()
    assert shapes == [*[(3, 12)] * 2, (3, count), *[(3, 8)] * 2, (3, count), *[(3, 1)] * 3]


@torch.no_grad()
@pytest.mark.parametrize(
    "asked",
    [
        {"logits_to_keep": 0},
        {"logits_to_keep": 12},
        {"logits_to_keep": 1, "output_hidden_states": True},
        {"logits_to_keep": 1, "labels": ids_of(12, 0)},
    ],
    ids=["all logits", "as many logits as tokens", "hidden states", "loss"],
)
def test_every_layer_computes_all_positions_where_more_is_wanted(weights: Any, asked: dict[str, Any]) -> None:
    before, after = (build(weights, Optimizations.all().replace(last_layer=on)) for on in (False, True))
    shapes = computed(after)
    expected, found = before(ids_of(12, 0), **asked), after(ids_of(12, 0), **asked)
    assert shapes == [(3, 12)] * 3
    assert torch.equal(found.logits, expected.logits)
    assert found.loss is None or torch.equal(found.loss, expected.loss)
    for one, other in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_the_arithmetic_it_saves_is_exactly_that_of_the_other_positions(weights: Any) -> None:
    """Of the products with weights; tests/perf/test_graph_cost.py counts attention, too."""
    config, counts = weights[0], []
    for on in (False, True):
        model = build(weights, Optimizations.all().replace(last_layer=on))
        with FlopCounterMode(display=False) as counter:
            model(ids_of(12, 0), logits_to_keep=1)
        found = counter.get_flop_counts()["Global"]
        counts.append(found.get(torch.ops.aten.mm, 0) + found.get(torch.ops.aten.addmm, 0))
    query = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    others = 3 * 11
    assert counts[0] - counts[1] == 2 * others * config.hidden_size * (2 * query + 3 * config.intermediate_size)


def test_compiled_prefill_is_one_graph_per_bucket(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(1)
        return module.forward

    monkeypatch.setattr(inductor, "BACKEND", backend)
    eager, model = (build(weights, Optimizations.all()) for _ in range(2))
    compile_model(model, "inductor")
    with torch.no_grad():
        for tokens, cut in ((12, 0), (12, 5), (10, 3), (13, 2), (16, 1)):
            mask = torch.ones(3, tokens, dtype=torch.int64)
            mask[1, :cut] = 0
            given = {"input_ids": ids_of(tokens, 1), "attention_mask": mask, "logits_to_keep": 1}
            found = model(past_key_values=model.allocate_cache(3, 64), **given).logits
            assert (found - eager(**given).logits).abs().max() < TOLERANCE
    torch._dynamo.reset()
    assert len(graphs) == 1
