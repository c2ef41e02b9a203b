"""transformers' contract around the model: everything the stock class answers, answered the same; and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import CACHE_NAME, cache_of, torch_dtype_of
from qwen2_npu.errors import CacheOverflowError, CheckpointError, UnsupportedError
from qwen2_npu.optimizations import VARIANTS
from qwen2_npu.parallel.collectives import Ranks
from tests.unit.parallel.virtual import sharded, virtual_ranks
from tests.unit.small import V4, small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens

TOLERANCE = 2e-4
"""float32: logits here reach a few tens and three layers sum some hundred terms, so errors stay near 1e-5."""

SWITCHES = [Optimizations.none(), *map(Optimizations.only, LADDER + VARIANTS), Optimizations.all()]


def named(optimizations: Optimizations) -> str:
    return "+".join(optimizations.names()) or "none"


@pytest.fixture(scope="module")
def stock():
    return small_stock()


@pytest.fixture(scope="module", params=SWITCHES, ids=named)
def model(request, stock):
    return Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=request.param)


@pytest.fixture(scope="module")
def full(stock):
    """Every step of the ladder on."""
    return Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 199, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def left_padding():
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(ours, theirs, where=None):
    difference = (ours - theirs).abs()
    assert (difference if where is None else difference[where.bool()]).max() < TOLERANCE


PAIRS = {
    named(Optimizations.of(pair, with_requirements=True)): Optimizations.of(pair, with_requirements=True)
    for pair in itertools.combinations(LADDER + VARIANTS, 2)
}


@pytest.mark.parametrize("optimizations", PAIRS.values(), ids=PAIRS)
@torch.no_grad()
def test_any_two_steps_go_together(optimizations, stock, ids, left_padding):
    """With what they need and nothing else: prompt, and the step after it."""
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    found, call = [], {"attention_mask": left_padding[:, :-1], "position_ids": positions(left_padding)[:, :-1]}
    for candidate in (model, stock):
        first = candidate(ids[:, :-1], **call, use_cache=True)
        more = {"attention_mask": left_padding, "position_ids": positions(left_padding)[:, -1:]}
        second = candidate(ids[:, -1:], **more, **{CACHE_NAME: cache_of(first)})
        found.append(torch.cat((first.logits, second.logits), dim=1))
    assert_close(*found, left_padding)


@torch.no_grad()
def test_logits_and_hidden_states_are_the_stock_ones(model, stock, ids):
    theirs = stock(ids, output_hidden_states=True)
    ours = model(ids, output_hidden_states=True)
    assert_close(ours.logits, theirs.logits)
    assert ours.logits.dtype == theirs.logits.dtype
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(mine, other)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_anywhere(model, stock, ids, left_padding, side):
    mask = {"left": left_padding, "right": left_padding.flip(1), "holes": left_padding.roll(2, dims=1)}[side]
    theirs = stock(ids, attention_mask=mask, position_ids=positions(mask), output_hidden_states=True)
    ours = model(ids, attention_mask=mask, position_ids=positions(mask), output_hidden_states=True)
    assert_close(ours.logits, theirs.logits, mask)
    assert_close(ours.hidden_states[1], theirs.hidden_states[1], mask)


@torch.no_grad()
def test_loss_over_all_positions(model, stock, ids):
    labels = ids.clone()
    labels[:, :3] = -100
    ours = model(ids, labels=labels, logits_to_keep=1)
    assert ours.logits.shape == (3, 12, 199)
    assert_close(ours.loss, stock(ids, labels=labels).loss)


@torch.no_grad()
def test_embeddings_instead_of_ids(model, stock, ids):
    embeds = stock.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, stock(inputs_embeds=embeds).logits)


@torch.no_grad()
def test_without_a_cache(model, stock, ids, left_padding):
    ours = model(ids, attention_mask=left_padding, position_ids=positions(left_padding), use_cache=False)
    assert cache_of(ours) is None
    theirs = stock(ids, attention_mask=left_padding, position_ids=positions(left_padding), use_cache=False)
    assert_close(ours.logits, theirs.logits, left_padding)


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 2, 5])
def test_continuation_sees_the_past(model, stock, ids, new):
    """Several new tokens after a filled cache: causality counts from the bottom right."""
    theirs = stock(ids).logits
    first = model(ids[:, :-new], use_cache=True)
    second = model(ids[:, -new:], past_key_values=cache_of(first))
    assert_close(second.logits, theirs[:, -new:])
    assert cache_of(second).get_seq_length() == 12


@torch.no_grad()
def test_continuation_of_ragged_rows_by_ragged_rows(model, stock, ids):
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :3] = 0
    mask[2, 5:8] = 0
    mask[1, 8:10] = 0
    theirs = stock(ids, attention_mask=mask, position_ids=positions(mask)).logits
    first = model(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions(mask)[:, :8], use_cache=True)
    second = model(
        ids[:, 8:], attention_mask=mask, position_ids=positions(mask)[:, 8:], past_key_values=cache_of(first)
    )
    assert_close(second.logits, theirs[:, 8:], mask[:, 8:])


@torch.no_grad()
def test_the_last_logits_only(model, ids, left_padding):
    everything = model(ids, attention_mask=left_padding).logits
    assert_close(model(ids, attention_mask=left_padding, logits_to_keep=1).logits, everything[:, -1:])
    assert_close(model(ids, attention_mask=left_padding, logits_to_keep=3).logits, everything[:, -3:])


@torch.no_grad()
def test_single_token_prompt(model, stock, ids):
    assert_close(model(ids[:, :1]).logits, stock(ids[:, :1]).logits)


def test_return_dict_false_is_a_tuple(full, ids):
    logits, cache = full(ids, return_dict=False)
    assert logits.shape == (3, 12, 199)
    assert cache.get_seq_length() == 12


@pytest.mark.skipif(V4, reason="4.37.0 refuses both: see test_compat")
@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                             "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=["sliding_window", "yarn", "linear"],
)  # fmt: skip
@pytest.mark.parametrize("optimizations", SWITCHES, ids=named)
@torch.no_grad()
def test_sliding_windows_and_rope_scaling(changes, optimizations, ids, left_padding):
    stock = small_stock(small_config(**changes))
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    assert_close(model(ids).logits, stock(ids).logits)
    arguments = {"attention_mask": left_padding, "max_new_tokens": 12, "do_sample": False}
    assert_same_tokens(model.generate(ids, **arguments), stock.generate(ids, **arguments), stock, arguments)
    first = model(ids[:, :7], use_cache=True)
    assert_close(model(ids[:, 7:], past_key_values=cache_of(first)).logits, stock(ids).logits[:, 7:])


def test_attention_weights_without_flash_attention(stock, ids):
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=Optimizations.none())
    with torch.no_grad():
        ours, theirs = model(ids, output_attentions=True), stock(ids, output_attentions=True)
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(mine, other)


def test_attention_weights_are_refused_whoever_asks_for_them(stock, ids):
    """The call, or the configuration where the call does not say."""
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))
    model.config.output_attentions = True
    with pytest.raises(UnsupportedError, match=r"^output_attentions=True: with .* on"):
        model(ids)
    assert model(ids, output_attentions=False).get("attentions") is None


def test_decode_goes_through_o_proj_in_two_dimensions(full, ids):
    seen = []
    hook = full.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dim()))
    first = full(ids, use_cache=True)
    full(ids[:, :1], past_key_values=cache_of(first))
    hook.remove()
    assert seen == [3, 2]


def test_prefill_and_decode_do_not_depend_on_what_stands_at_padding(full, ids, left_padding):
    """No result of a masked row reaches a live one: other padding tokens give bit-identical logits."""
    other = torch.where(left_padding.bool(), ids, (ids + 7) % 199)
    first, second = (full(x, attention_mask=left_padding, use_cache=True) for x in (ids, other))
    assert torch.equal(first.logits[left_padding.bool()], second.logits[left_padding.bool()])
    mask = torch.cat((left_padding, left_padding.new_ones(3, 1)), dim=1)
    steps = [full(ids[:, :1], attention_mask=mask, past_key_values=cache_of(out)).logits for out in (first, second)]
    assert torch.equal(*steps)


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, r"empty prompt: .*\(2, 0\)"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"input_ids \(batch, tokens\) expected"),
        ({"input_ids": torch.tensor([[3, 199]])}, ValueError, r"token id 199 is outside the vocabulary of 199"),
        ({"input_ids": torch.tensor([[3, -1]])}, ValueError, r"token id -1 is outside the vocabulary"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[0, 0]])}, ValueError, "no live token"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 5)}, ValueError, r"covers 5 tokens"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 1, 2, 2)}, ValueError, "a 2-D mask"),
        ({"input_ids": torch.tensor([[3, 4]]), "foo": 1}, TypeError, r"forward\(\) takes no argument foo"),
        ({"input_ids": torch.tensor([[3, 4]]), "position_ids": torch.tensor([[0, 512]])}, ValueError,
         "position_ids holds 512, the model has max_position_embeddings=512"),
        ({"input_ids": torch.ones(1, 513, dtype=torch.int64), "use_cache": False}, ValueError, "513 tokens need"),
        ({"input_ids": torch.tensor([[3, 4]]), "output_attentions": True}, UnsupportedError,
         "optimizations with fixed_kv_cache and flash_attention off"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(full, arguments, error, message):
    with pytest.raises(error, match=message):
        full(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("optimizations", [Optimizations.all(), Optimizations.none()], ids=named)
def test_a_continuation_is_looked_into(stock, ids, optimizations):
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    first = model(ids, use_cache=True)
    for new, changes, message in (
        (ids[:, :1] + 300, {}, "is outside the vocabulary of 199"),
        (ids[:, :2] + 300, {}, "is outside the vocabulary of 199"),
        (ids[:, :1], {"position_ids": torch.tensor([[512]])}, "position_ids holds 512"),
        (ids[:, :1], {"position_ids": torch.tensor([[-1]])}, "position_ids holds -1"),
        (ids[:1, :1], {}, "rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model(new, past_key_values=cache_of(first), **changes)
    assert cache_of(first).get_seq_length() == 12


@torch.no_grad()
@pytest.mark.skipif(V4, reason="4.37.0 has no logits_to_keep")
@pytest.mark.parametrize("keep", [1, 3, 40, torch.tensor([-1]), torch.tensor([2, 0, 7]), torch.tensor(5)], ids=repr)
def test_kept_logits_are_the_stock_ones(model, stock, ids, left_padding, keep):
    arguments = {"attention_mask": left_padding, "position_ids": positions(left_padding), "logits_to_keep": keep}
    ours, theirs = model(ids, **arguments).logits, stock(ids, **arguments).logits
    assert ours.shape == theirs.shape
    index = slice(-keep, None) if isinstance(keep, int) else keep
    assert_close(ours, theirs, left_padding[:, index])


@pytest.mark.skipif(V4, reason="4.37.0 has no logits_to_keep")
def test_loss_over_kept_logits(full, stock, ids):
    assert_close(*(m(ids, labels=ids[:, -4:], logits_to_keep=4).loss for m in (full, stock)))
    with pytest.raises(ValueError, match=r"labels of shape \(3, 2\) for logits of \(3, 4\)"):
        full(ids, labels=ids[:, -2:], logits_to_keep=4)


@pytest.mark.parametrize("keep", [6, torch.tensor([9, 0, 5, 2, 7])], ids=repr)
def test_loss_over_kept_logits_leaves_out_what_follows_padding(full, ids, left_padding, keep):
    """Padding at the end, within what is kept; positions may be kept in any order."""
    mask, kept = left_padding.flip(1), slice(-keep, None) if isinstance(keep, int) else keep
    loss = full(ids, attention_mask=mask, labels=ids[:, kept], logits_to_keep=keep).loss
    logits = full(ids, attention_mask=mask).logits[:, kept]
    counted = mask[:, kept][:, :-1].bool()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][counted], ids[:, kept][:, 1:][counted])
    assert_close(loss, expected)


def test_loss_leaves_out_what_follows_padding(full, ids, left_padding):
    """Logits at padding are unspecified: no loss may depend on them."""
    labels = ids.masked_fill(left_padding == 0, -100)
    other = torch.where(left_padding.bool(), ids, (ids + 7) % 199)
    losses = [full(tokens, attention_mask=left_padding, labels=labels).loss for tokens in (ids, other)]
    assert torch.equal(*losses)
    logits, mask = full(ids, attention_mask=left_padding).logits, left_padding.bool()
    counted = mask[:, :-1] & mask[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][counted], ids[:, 1:][counted])
    assert_close(losses[0], expected)


def test_a_model_widened_after_use_is_as_exact_as_one_never_narrowed(stock, ids):
    weights = {name: tensor.bfloat16() for name, tensor in stock_weights(stock).items()}
    used = Qwen2ForCausalLM.from_state_dict(stock.config, weights)
    used(ids)
    fresh = Qwen2ForCausalLM.from_state_dict(stock.config, weights)
    assert torch.equal(used.float()(ids).logits, fresh.float()(ids).logits)


@torch.no_grad()
def test_outputs_that_the_config_asks_for(stock, ids):
    config = small_config(output_hidden_states=True, return_dict=False)
    asked = Qwen2ForCausalLM.from_state_dict(config, stock_weights(stock))
    assert isinstance(asked(ids), tuple)
    assert len(asked(ids, return_dict=True).hidden_states) == 4
    assert asked(ids, return_dict=True, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_either_name_of_the_cache(full, ids, name):
    cache = full.allocate_cache(3, 64)
    assert cache_of(full(ids[:, :5], **{name: cache})) is cache
    step = full(ids[:, 5:], **{name: cache}).logits
    assert_close(step, full(ids).logits[:, 5:])
    with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
        full(ids, cache=cache, past_key_values=cache)


def test_overflow_raises_before_anything_is_written(full, ids):
    cache = full.allocate_cache(3, 100)
    full(ids, past_key_values=cache, use_cache=True)
    before = [tensor.clone() for tensor in cache.key_cache]
    with pytest.raises(CacheOverflowError, match=r"120 new tokens after 12 do not fit the KV cache of 128 slots"):
        full(torch.ones(3, 120, dtype=torch.int64), past_key_values=cache)
    assert all(torch.equal(old, new) for old, new in zip(before, cache.key_cache, strict=True))
    assert cache.lengths == [12, 12, 12]


def test_more_positions_than_the_model_has(full):
    with pytest.raises(ValueError, match=r"need 513 positions, the model has max_position_embeddings=512"):
        full.allocate_cache(1, 513)
    with pytest.raises(ValueError, match=r"max_position_embeddings=512"):
        full.generate(torch.ones(1, 513, dtype=torch.int64), max_new_tokens=50)


def test_another_kind_of_cache(full, ids):
    from transformers.cache_utils import DynamicCache

    with pytest.raises(UnsupportedError, match=r"DynamicCache: with fixed_kv_cache on pass model.allocate_cache\("):
        full(ids, past_key_values=DynamicCache())
    growing = Qwen2ForCausalLM(small_config(num_hidden_layers=1), Optimizations.none())
    for call, more in ((growing.forward, {}), (growing.generate, {"max_new_tokens": 2})):
        with pytest.raises(UnsupportedError, match=r"FixedKVCache: with fixed_kv_cache off pass model.allocate_c"):
            call(ids, past_key_values=full.allocate_cache(3, 64), **more)


def test_another_activation():
    with pytest.raises(UnsupportedError, match=r"hidden_act='gelu': this model computes silu"):
        Qwen2ForCausalLM(small_config(hidden_act="gelu"))


def test_heads_that_do_not_divide():
    config = small_config()
    config.num_key_value_heads = 3
    with pytest.raises(CheckpointError, match=r"num_key_value_heads=3 does not divide num_attention_heads=4"):
        Qwen2ForCausalLM(config)


def test_a_config_that_asks_for_another_attention_is_left_as_it_is():
    config = small_config()
    config._attn_implementation = "sdpa"
    Qwen2ForCausalLM(config)
    assert config._attn_implementation == "sdpa"


def test_random_initialisation_follows_the_config():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(small_config(initializer_range=0.5))
    assert model.model.layers[0].self_attn.qkv_proj.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert not model.model.layers[0].self_attn.qkv_proj.bias.any()


def test_the_config_keeps_the_dtype(full):
    assert torch_dtype_of(full.config) in (None, torch.float32)


@pytest.mark.parametrize("vocabulary", [198, 199], ids=["cut", "whole"])
@torch.no_grad()
def test_all_ranks_choose_a_token_of_the_same_bits(ids, vocabulary):
    """A head that is whole on every rank may round otherwise on each card: the logits are those of the first."""
    stock = small_stock(small_config(num_hidden_layers=1, vocab_size=vocabulary))

    def run(ranks: Ranks) -> torch.Tensor:
        model = sharded(stock.config, stock_weights(stock), ranks)
        model.lm_head.weight += 1e-3 * ranks.shard.rank  # another card
        return model(ids % vocabulary).logits

    with virtual_ranks(2) as on_all:
        first, second = on_all(run)
    assert torch.equal(first, second)
