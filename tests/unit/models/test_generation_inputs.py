"""What ``generate`` computes next: the ids that are new, their positions, and the cache of the first pass."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import Cache

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import cache_of, growing_cache
from qwen2_npu.models import generation
from tests.unit.small import small_config, small_stock, stock_weights

SWITCHES = {
    "none": Optimizations.none(),
    "fixed_kv_cache": Optimizations.only("fixed_kv_cache"),
    "all": Optimizations.all(),
}


@pytest.fixture(scope="module")
def stock():
    return small_stock(small_config(num_hidden_layers=1))


@pytest.fixture(scope="module", params=SWITCHES)
def model(request, stock):
    weights = stock_weights(stock)
    return Qwen2ForCausalLM.from_state_dict(stock.config, weights, optimizations=SWITCHES[request.param])


IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


# ---- a loop of one's own ------------------------------------------------------------------------------------------
def test_inputs_are_prepared_outside_of_a_generation_too(stock, model):
    """As the stock class prepares them; a prompt that ends in padding is refused there, too."""
    given = {"attention_mask": MASK, "use_cache": False}
    ours = model.prepare_inputs_for_generation(IDS, **given)
    theirs = stock.prepare_inputs_for_generation(IDS, **given)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert (ours.get(name) is None) == (theirs.get(name) is None)
        if ours.get(name) is not None:
            live = MASK.bool()  # 4.37.0 has other positions at padding
            assert torch.equal(ours[name][live], theirs[name][live])
    with pytest.raises(ValueError, match="row 1 of the prompt is padded on the right"):
        model.prepare_inputs_for_generation(IDS, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]))


def test_processors_are_made_outside_of_a_generation_too(stock, model):
    given = {
        "input_ids_seq_length": 5, "encoder_input_ids": IDS, "prefix_allowed_tokens_fn": None, "logits_processor": [],
        "model_kwargs": {},
    }  # fmt: skip
    settings = GenerationConfig(repetition_penalty=1.2, min_new_tokens=3, eos_token_id=7, max_new_tokens=9)
    ours, theirs = (candidate._get_logits_processor(settings, **given) for candidate in (model, stock))
    assert [type(one) for one in ours] == [type(one) for one in theirs]
    assert RepetitionPenaltyLogitsProcessor in [type(one) for one in ours]


# ---- what 4.37.0 leaves to the model, on every version --------------------------------------------------------------
@torch.no_grad()
def filled(model: Qwen2ForCausalLM, past: int) -> Cache:
    return cache_of(model(IDS[:, :past], use_cache=True))


def inputs(model: Qwen2ForCausalLM, **given: object) -> dict[str, object]:
    """Tensors as lists, which compare as a whole."""
    prepared = model._inputs_of_v4(**given)
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in prepared.items()}


def last_token(model: Qwen2ForCausalLM) -> dict[str, int]:
    return {"logits_to_keep": 1} if model.optimizations.last_token_logits else {}


def test_a_prompt_is_computed_whole(model):
    """Positions are counted from the mask; at padding before the first token they are 0."""
    found = inputs(model, input_ids=IDS, attention_mask=MASK, use_cache=False, token_type_ids=IDS)
    assert found == {
        "input_ids": IDS.tolist(), "past_key_values": None, "attention_mask": MASK.tolist(),
        "position_ids": [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], "use_cache": False, **last_token(model),
    }  # fmt: skip
    found = inputs(model, input_ids=IDS)
    assert found == {
        "input_ids": IDS.tolist(), "past_key_values": None, "attention_mask": None, "position_ids": None,
        "use_cache": None, **last_token(model),
    }  # fmt: skip


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("past", [1, 3, 4])
def test_what_the_cache_holds_is_left_out(model, past, masked):
    cache = filled(model, past)
    given = {"attention_mask": MASK} if masked else {}
    found = inputs(model, input_ids=IDS, past_key_values=cache, use_cache=True, **given)
    positions = [[0, 0, 0, 1, 2][past:], [0, 1, 2, 3, 4][past:]]
    assert found == {
        "input_ids": [[11, 12, 13, 14, 15][past:], [21, 22, 23, 24, 25][past:]], "past_key_values": cache,
        "attention_mask": MASK.tolist() if masked else None, "position_ids": positions if masked else None,
        "use_cache": True, **last_token(model),
    }  # fmt: skip


def test_new_ids_alone_are_all_new(model):
    """After embeddings, too: they are of the first pass, and ``input_ids`` has none of their tokens."""
    for given in ({}, {"inputs_embeds": torch.ones(2, 4, 256)}):
        found = inputs(model, input_ids=IDS[:, :1], past_key_values=filled(model, 4), attention_mask=MASK, **given)
        assert found["input_ids"] == [[11], [21]]
        assert found["position_ids"] == [[2], [4]]
        assert "inputs_embeds" not in found


def test_embeddings_are_the_prompt(model):
    """Whatever ids are passed beside them: transformers passes none, or one that begins a text."""
    embeds = torch.arange(2 * 5 * 256.0).view(2, 5, 256)
    for ids in (IDS[:, :0], IDS[:, :1]):
        for cache in (None, model.allocate_cache(2, 64)):
            given = {"attention_mask": MASK, "inputs_embeds": embeds, "past_key_values": cache}
            found = inputs(model, input_ids=ids, **given)
            assert found["inputs_embeds"] == embeds.tolist()
            assert found["position_ids"] == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
            assert "input_ids" not in found


def test_positions_of_the_caller_are_kept(model):
    places = torch.tensor([[3, 5, 7, 9, 11], [4, 5, 6, 7, 8]])
    for given in ({}, {"attention_mask": MASK}):
        call = {"input_ids": IDS, "position_ids": places, **given}
        assert inputs(model, **call)["position_ids"] == places.tolist()
        assert inputs(model, **call, past_key_values=filled(model, 3))["position_ids"] == [[9, 11], [7, 8]]


@pytest.mark.parametrize("of", ["ids", "embeddings"])
@pytest.mark.parametrize(
    ("tokens", "new", "capacity"),
    [(127, None, 128), (128, None, 256), (120, 8, 128), (120, 9, 256), (2, 126, 128), (2, 127, 256)],
)
def test_the_first_pass_has_a_cache_for_all_tokens_but_the_last_and_one_more(model, of, tokens, new, capacity):
    """``new``: within a generation. Outside of one, for the token that the next pass computes."""
    given = {"input_ids": torch.ones(2, tokens, dtype=torch.int64)}
    if of == "embeddings":
        given = {"input_ids": torch.ones(2, 0, dtype=torch.int64), "inputs_embeds": torch.ones(2, tokens, 256)}
    token = generation._CALL.set(None if new is None else generation.GenerateCall(model, {}, new_tokens=new))
    try:
        cache = model._inputs_of_v4(**given, use_cache=True)["past_key_values"]
    finally:
        generation._CALL.reset(token)
    assert cache.get_seq_length() == 0
    if model.optimizations.fixed_kv_cache:
        assert (cache.shape.batch_size, cache.shape.capacity) == (2, capacity)
    else:
        assert type(cache) is type(growing_cache())


def test_the_first_pass_keeps_the_cache_of_the_caller_and_makes_none_where_none_is_used(model):
    for cache in (growing_cache(), model.allocate_cache(2, 64)):
        for use_cache in (True, False, None):
            call = {"input_ids": IDS, "past_key_values": cache, "use_cache": use_cache}
            assert model._inputs_of_v4(**call)["past_key_values"] is cache
    for use_cache in (False, None):
        assert model._inputs_of_v4(IDS, use_cache=use_cache)["past_key_values"] is None
