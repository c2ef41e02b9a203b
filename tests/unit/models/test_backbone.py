"""What one forward pass has room for: positions, slots and the rotary table; and windows across padding."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import StoppingCriteriaList

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.cache import FixedKVCache
from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph.steps import CompiledStep
from qwen2_npu.models import arguments, backbone, layers
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.mixture import mixture_config, needs_mixtures
from tests.unit.parallel.virtual import sharded, virtual_ranks
from tests.unit.small import V4, small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens

TOLERANCE = 2e-4  # as in test_qwen2.py
FEW = 24
"""Positions of a model that has few."""

SWITCHES = {
    "none": Optimizations.none(),
    "BNSD": Optimizations.up_to("fixed_kv_cache"),
    "all": Optimizations.all(),
}
FIXED = ("BNSD", "all", "compiled")


def model_of(name: str, stock) -> Qwen2ForCausalLM:
    """``compiled``: steps go through what compile_model puts in place; no compiler is needed."""
    optimizations = SWITCHES.get(name, Optimizations.all())
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    if name == "compiled":
        steps = {"prefill": model.prefill_step, "decode": model.decode_step}
        model.compiled_steps = {name: CompiledStep(step, lambda call: call) for name, step in steps.items()}
    return model


def tokens(rows: int, width: int) -> torch.Tensor:
    return torch.randint(1, 199, (rows, width), generator=torch.Generator().manual_seed(width))


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(value) for value in row] for row in rows])


@pytest.fixture(scope="module")
def stock():
    return small_stock(small_config(num_hidden_layers=1))


@pytest.fixture(scope="module")
def short():
    return small_stock(small_config(num_hidden_layers=1, max_position_embeddings=FEW))


def assert_live_alike(found: torch.Tensor, expected: torch.Tensor, live: torch.Tensor) -> None:
    assert (found - expected).abs()[live.bool()].max() < TOLERANCE


# ---- positions ------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(V4, reason="4.37.0 counts no padding, and has a table of its own")
@pytest.mark.parametrize("name", ["none", *FIXED])
@torch.no_grad()
def test_padding_may_take_positions_that_the_model_does_not_have(short, name):
    """Where nobody says which, they are counted with padding, as the stock model counts them."""
    ids, mask = tokens(2, 31), mask_of("0" * 9 + "1" * 22, "0" * 26 + "1" * 5)
    expected = short(ids, attention_mask=mask).logits
    assert_live_alike(model_of(name, short)(ids, attention_mask=mask).logits, expected, mask)


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_each_row_counts_its_own_tokens_against_the_positions(short, name):
    """20 tokens and 1 more in one row, 3 and 20 in the other: neither has 40."""
    first, second = mask_of("1" * 20, "0" * 17 + "1" * 3), mask_of("0" * 19 + "1", "1" * 20)
    ids, whole = tokens(2, 40), torch.cat((first, second), dim=1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    expected = short(ids, attention_mask=whole, position_ids=places).logits
    model = model_of(name, short)
    cache = model.allocate_cache(2, FEW)
    model(ids[:, :20], attention_mask=first, position_ids=places[:, :20], **{CACHE_NAME: cache})
    found = model(ids[:, 20:], attention_mask=whole, position_ids=places[:, 20:], **{CACHE_NAME: cache}).logits
    assert_live_alike(found, expected[:, 20:], second)
    assert cache.lengths == [21, 23]


@pytest.mark.parametrize("name", ["none", *FIXED])
@pytest.mark.parametrize("new", [1, 5])
@torch.no_grad()
def test_a_continuation_ends_with_the_last_position(short, name, new):
    """Though the cache has slots beyond it, whose number is that of a bucket."""
    model = model_of(name, short)
    cache = model.allocate_cache(1, FEW)
    model(tokens(1, FEW - new), **{CACHE_NAME: cache})
    model(tokens(1, new), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=f"{FEW + new} tokens need as many positions, the model has"):
        model(tokens(1, new), **{CACHE_NAME: cache})
    assert cache.get_seq_length() == FEW


# ---- slots ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("width", "capacity"), [(300, 512), (100, 384), (512, 512)])
@torch.no_grad()
def test_a_cache_that_forward_makes_has_no_more_slots_than_positions(stock, width, capacity):
    assert cache_of(model_of("all", stock)(tokens(1, width))).shape.capacity == capacity


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("new", [1, 5])
@torch.no_grad()
def test_a_continuation_may_fill_the_last_slots(stock, name, new):
    """A prompt is computed in a bucket; what comes after it, as it is."""
    ids, model = tokens(1, 128), model_of(name, stock)
    cache = model.allocate_cache(1, 128)
    model(ids[:, :-new], **{CACHE_NAME: cache})
    found = model(ids[:, -new:], **{CACHE_NAME: cache}).logits
    assert cache.lengths == [128]
    assert (found - stock(ids).logits[:, -new:]).abs().max() < TOLERANCE


@pytest.mark.skipif(V4, reason="4.37.0's generate does not continue from a Cache object")
@torch.no_grad()
def test_a_cache_grows_by_the_tokens_of_its_longest_row_and_not_by_its_padding(stock):
    """150 tokens have been seen or will be, of which 110 take a slot."""
    model, ids = model_of("all", stock), tokens(1, 145)
    mask = torch.cat((torch.zeros(1, 40, dtype=torch.int64), torch.ones(1, 105, dtype=torch.int64)), dim=1)
    cache = model.allocate_cache(1, 110)
    places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts
    for start, stop in ((0, 100), (100, 140)):
        given = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]}
        model(ids[:, start:stop], **given, **{CACHE_NAME: cache})
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(ids, **{CACHE_NAME: cache}, **call)
    assert (cache.shape.capacity, cache.lengths) == (128, [110])
    assert_same_tokens(found, model.generate(ids, **call), model, call)


@torch.no_grad()
def test_a_generation_says_nothing_to_another_model(stock):
    """A processor or a criterion may call one: its caches are those that it makes at any other time."""
    model, other, ids = model_of("all", stock), model_of("all", stock), tokens(1, 5)
    usual = cache_of(other(ids)).shape.capacity
    capacities = []

    def criterion(*given, **more) -> torch.Tensor:
        capacities.append(cache_of(other(ids)).shape.capacity)
        return torch.tensor([len(capacities) == 2])

    model.generate(ids, max_new_tokens=500, do_sample=False, stopping_criteria=StoppingCriteriaList([criterion]))
    assert capacities == [usual, usual]


@pytest.mark.parametrize("same", [False, True], ids=["another model", "the same model"])
@torch.no_grad()
def test_a_generation_goes_on_after_one_within_it(stock, same):
    """An assistant, or a criterion that generates: the outer call is known again, so no step looks into masks."""
    model, ids, known = model_of("all", stock), tokens(1, 5), []
    inner = model if same else model_of("all", stock)

    def criterion(*given, **more) -> torch.Tensor:
        outer = model._call()
        inner.generate(ids[:, :3], max_new_tokens=2, do_sample=False)
        known.append(outer is not None and model._call() is outer)
        return torch.tensor([False])

    call = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(ids, **call, stopping_criteria=StoppingCriteriaList([criterion]))
    assert known == [True] * (3 if V4 else 4)  # 4.37.0 asks no criterion about the last token
    assert_same_tokens(found, model.generate(ids, **call))


@pytest.mark.parametrize("fails", [False, True])
@torch.no_grad()
def test_a_generation_that_has_ended_says_nothing_to_later_calls(stock, fails):
    model, ids = model_of("all", stock), tokens(1, 5)
    usual = cache_of(model(ids)).shape.capacity

    def criterion(*given, **more) -> torch.Tensor:
        if fails:
            raise KeyboardInterrupt
        return torch.tensor([True])

    call = {"max_new_tokens": 500, "stopping_criteria": StoppingCriteriaList([criterion])}
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        model.generate(ids, do_sample=False, **call)
    assert cache_of(model(ids)).shape.capacity == usual


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_keys_and_values_are_where_the_cache_says(name):
    """For callers who look: ``key_cache`` and ``value_cache`` of each layer, of one row's tokens from slot 0 on."""
    stock, ids, mask = small_stock(small_config(num_hidden_layers=2)), tokens(2, 6), mask_of("111111", "001111")
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    model = model_of(name, stock)
    cache = model.allocate_cache(2, 6)
    model(ids, **call, **{CACHE_NAME: cache})
    theirs = cache_of(stock(ids, **call, use_cache=True))
    pairs = [(layer[0], layer[1]) if V4 else (layer.keys, layer.values) for layer in (theirs if V4 else theirs.layers)]
    for layer, (keys, values) in enumerate(pairs):
        for found, expected in ((cache.key_cache[layer], keys), (cache.value_cache[layer], values)):
            slots = found if cache.shape.layout == "BNSD" else found.transpose(1, 2)
            assert (slots[0, :, :6] - expected[0]).abs().max() < TOLERANCE
            assert (slots[1, :, :4] - expected[1, :, 2:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["none", "all"])
@torch.no_grad()
def test_a_cache_is_made_where_the_call_or_else_the_configuration_says(name, monkeypatch):
    """Elsewhere there is none, not even one that is thrown away: it would hold the keys and values of all layers."""
    made = []
    for owner, what in ((backbone, "growing_cache"), (FixedKVCache, "__init__")):
        right = getattr(owner, what)
        monkeypatch.setattr(owner, what, lambda *given, right=right: made.append(given) or right(*given))
    model = model_of(name, small_stock(small_config(num_hidden_layers=1)))
    for usual, asked, wanted in ((True, None, True), (False, None, False), (True, False, False), (False, True, True)):
        model.config.use_cache = usual
        made.clear()
        output = model(tokens(1, 3), **({} if asked is None else {"use_cache": asked}))
        assert (output.get(CACHE_NAME) is not None) == (len(made) == 1) == wanted
        cache = model.allocate_cache(1, 8)
        made.clear()
        assert model(tokens(1, 3), use_cache=True, **{CACHE_NAME: cache}).get(CACHE_NAME) is cache
        assert not made


# ---- the rotary table -----------------------------------------------------------------------------------------------
@torch.no_grad()
def test_one_rotary_table_serves_as_long_as_the_cache_has_room(stock, monkeypatch):
    """A longer one in the middle of a generation would be another graph."""
    for module in (layers, backbone):
        monkeypatch.setattr(module, "TABLE_ROWS", 64)
    model, ids = model_of("all", stock), tokens(1, 256)
    cache = model.allocate_cache(1, 200)
    tables = []
    for start, stop in ((0, 9), (9, 10), (10, 150), (150, 256)):
        model(ids[:, start:stop], **{CACHE_NAME: cache})
        tables.append(model.model.rotary.cos)
    assert all(table is tables[0] for table in tables)
    assert len(tables[0]) == 256


@pytest.mark.parametrize("name", ["none", *FIXED])
@torch.no_grad()
def test_positions_that_a_caller_gives_have_rows_in_the_table(stock, name, monkeypatch):
    ids, places = tokens(1, 5), torch.tensor([[3, 100, 200, 400, 511]])
    expected = model_of(name, stock)(ids, position_ids=places).logits
    if not V4:  # whose own table has a row for each token
        assert (expected - stock(ids, position_ids=places).logits).abs().max() < TOLERANCE
    for module in (layers, backbone):
        monkeypatch.setattr(module, "TABLE_ROWS", 64)
    found = model_of(name, stock)(ids, position_ids=places).logits
    assert torch.equal(found, expected)


# ---- windows --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(V4, reason="4.37.0 has no sliding window here")
@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_padding_of_an_earlier_pass_may_be_a_hole_in_a_window(name):
    """Padding on the right is none until a token follows it: the pass of that token is refused, and writes nothing."""
    config = small_config(num_hidden_layers=1, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    model = model_of(name, small_stock(config))
    cache = model.allocate_cache(2, 128)
    first = mask_of("11110", "11111")
    model(tokens(2, 5), attention_mask=first, **{CACHE_NAME: cache})
    whole = torch.cat((first, mask_of("111", "111")), dim=1)
    with pytest.raises(UnsupportedError, match="row 0 has padding between its tokens"):
        model(tokens(2, 3), attention_mask=whole, **{CACHE_NAME: cache})
    assert cache.lengths == [4, 5]


@pytest.mark.skipif(V4, reason="4.37.0 has no sliding window here")
@torch.no_grad()
def test_a_hole_is_refused_before_the_window_reaches_it():
    """With room in the cache it will: later steps of generate() are not looked into."""
    config = small_config(num_hidden_layers=1, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    stock = small_stock(config)
    model, ids, mask = model_of("all", stock), tokens(1, 5), mask_of("11011")
    with pytest.raises(UnsupportedError, match="row 0 has padding between its tokens"):
        model(ids, attention_mask=mask, **{CACHE_NAME: model.allocate_cache(1, 5)})
    found = model(ids, attention_mask=mask, use_cache=False).logits
    assert_live_alike(found, stock(ids, attention_mask=mask).logits, mask)


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_a_mask_is_compared_with_the_cache_token_by_token(stock, name):
    """It shows padding, and hides as many tokens: the numbers of tokens are the same."""
    model = model_of(name, stock)
    cache = model.allocate_cache(2, 8)
    model(tokens(2, 4), attention_mask=mask_of("0111", "1111"), **{CACHE_NAME: cache})
    with pytest.raises(UnsupportedError, match="token 0 of row 0 was padding when it was written"):
        model(tokens(2, 1), attention_mask=mask_of("11011", "11111"), **{CACHE_NAME: cache})
    with pytest.raises(UnsupportedError, match="token 0 of row 0 was padding when it was written"):
        model(tokens(2, 1), attention_mask=mask_of("11111", "01111"), **{CACHE_NAME: cache})


# ---- masks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["none", *FIXED])
@pytest.mark.parametrize("new", [5, 1])
@torch.no_grad()
def test_a_mask_of_other_values_is_refused(stock, name, new):
    model = model_of(name, stock)
    cache = model.allocate_cache(1, 8)
    model(tokens(1, 3), **{CACHE_NAME: cache})
    mask = torch.ones(1, 3 + new, dtype=torch.int64)
    mask[0, -1] = 2
    with pytest.raises(ValueError, match="attention_mask holds 2: pass 1 for a token and 0 for padding"):
        model(tokens(1, new), attention_mask=mask, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", ["none", *FIXED])
@torch.no_grad()
def test_what_is_masked_weighs_nothing_however_low_the_scores_are(name):
    """Of the first token they are some ten thousand below 0 in half of the heads."""
    stock = small_stock(small_config(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8))
    for projection in (stock.model.layers[0].self_attn.q_proj, stock.model.layers[0].self_attn.k_proj):
        projection.weight.mul_(1000)
    model = model_of(name, stock)
    found = [model(torch.cat((torch.tensor([[5]]), rest), dim=1)).logits[:, 0] for rest in tokens(4, 6).split(1)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", ["none", "all"])
def test_the_end_of_a_prompt_is_looked_at_once_in_a_generation(stock, name, monkeypatch):
    """Looking waits for the device."""
    looked = []
    right = arguments.check_ends
    monkeypatch.setattr(arguments, "check_ends", lambda *given: looked.append(given) or right(*given))
    model_of(name, stock).generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
    assert len(looked) == 1


# ---- what is asked for -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asked", [(), ("hidden_states",), ("attentions",), ("hidden_states", "attentions")], ids=str)
@torch.no_grad()
def test_what_is_not_asked_for_is_not_there(stock, asked):
    model, ids = model_of("none", stock), tokens(1, 5)
    given = {f"output_{name}": True for name in asked}
    for use_cache in (True, False):
        output = model(ids, use_cache=use_cache, **given)
        assert {name for name in ("hidden_states", "attentions") if output.get(name) is not None} == set(asked)
        assert (output.get(CACHE_NAME) is not None) == use_cache
    given[CACHE_NAME] = model.allocate_cache(1, 5)
    assert model(ids, use_cache=False, **given).get(CACHE_NAME) is None


@pytest.mark.parametrize("field", ["output_attentions", "output_hidden_states", "return_dict"])
@pytest.mark.parametrize(("configured", "asked"), [(True, None), (False, None), (True, False), (False, True)])
def test_the_configuration_says_what_is_returned_where_the_call_does_not(stock, field, configured, asked):
    model, usual, ids = model_of("none", stock), model_of("none", stock), tokens(1, 5)
    setattr(model.config, field, configured)
    found = model(ids, **({} if asked is None else {field: asked}))
    expected = usual(ids, **{field: configured if asked is None else asked})
    assert (type(found), len(found)) == (type(expected), len(expected))


@pytest.mark.parametrize("name", ["none", *FIXED])
@torch.no_grad()
def test_hidden_states_of_a_prompt_and_of_a_step_are_the_stock_ones(stock, name):
    """No compiled step records them."""
    ids, found = tokens(2, 6), []
    for candidate in (stock, model_of(name, stock)):
        prompt = candidate(ids[:, :5], use_cache=True, output_hidden_states=True)
        step = candidate(ids[:, 5:], output_hidden_states=True, **{CACHE_NAME: cache_of(prompt)})
        found.append((*prompt.hidden_states, *step.hidden_states))
    assert len(found[1]) == len(found[0]) == 4
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


KEPT = [torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([False]), slice(0, 0), torch.tensor(-1)]


@pytest.mark.skipif(V4, reason="4.37.0 has no logits_to_keep")
@pytest.mark.parametrize("name", ["none", *FIXED])
@pytest.mark.parametrize("keep", KEPT, ids=str)
@torch.no_grad()
def test_kept_logits_of_a_decode_step_are_the_stock_ones(stock, name, keep):
    """Also those of one position twice, and of none."""
    ids, found = tokens(2, 6), []
    for candidate in (stock, model_of(name, stock)):
        cache = cache_of(candidate(ids[:, :5], use_cache=True))
        found.append(candidate(ids[:, 5:], logits_to_keep=keep, **{CACHE_NAME: cache}).logits)
    assert found[0].shape == found[1].shape
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_every_rank_has_the_attention_weights_of_all_heads(stock):
    ids = tokens(2, 5)
    expected = stock(ids, output_attentions=True).attentions

    def run(ranks):
        model = sharded(stock.config, stock_weights(stock), ranks, Optimizations.none())
        return model(ids, output_attentions=True).attentions

    with virtual_ranks(2) as on_all:
        for found in on_all(run):
            assert len(found) == len(expected) == 1
            assert found[0].shape == expected[0].shape
            assert (found[0] - expected[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["none", *FIXED])
@torch.no_grad()
def test_the_loss_after_a_cache_leaves_out_what_follows_padding_of_this_pass(stock, name):
    """Of the mask the last columns count, not those of the tokens before."""
    model, ids = model_of(name, stock), tokens(2, 12)
    mask = mask_of("000111" + "111000", "111111" + "111110")
    cache = model.allocate_cache(2, 12)
    model(ids[:, :6], attention_mask=mask[:, :6], **{CACHE_NAME: cache})
    found = model(ids[:, 6:], attention_mask=mask, labels=ids[:, 6:], **{CACHE_NAME: cache})
    counted = mask[:, 6:-1].bool()
    expected = torch.nn.functional.cross_entropy(found.logits[:, :-1][counted], ids[:, 7:][counted])
    assert abs(float(found.loss - expected)) < 1e-5


@needs_mixtures
def test_only_products_that_are_cut_over_the_ranks_are_told_their_communicator():
    """The shared expert's is added up with the other experts, and not by itself."""
    config, ranks = mixture_config(), Ranks(Shard(0, 2), hcom="group")
    optimizations = Optimizations.all().replace(mm_all_reduce=True)
    model = Qwen2ForCausalLM.of_kind(config)(config, optimizations, ranks)
    model._open_communicator(model.device)
    found = {name: module.hcom for name, module in model.model.named_modules() if hasattr(module, "hcom")}
    assert found == {"layers.0.self_attn.o_proj": "group", "layers.0.mlp.shared_expert.down_proj": None}


# ---- caches of another model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["BNSD", "all"])
@torch.no_grad()
def test_a_cache_of_the_dtype_that_the_model_had_is_refused(stock, name):
    """It was this model's own, and was written before."""
    model, ids = model_of(name, stock), tokens(1, 5)
    cache = model.allocate_cache(1, 8)
    model(ids, **{CACHE_NAME: cache})
    with pytest.raises(UnsupportedError, match=r"float32 .*and this model writes a .*bfloat16"):
        model.bfloat16()(ids[:, :1], **{CACHE_NAME: cache})
    assert cache.lengths == [5]
    model.float()(ids[:, :1], **{CACHE_NAME: cache})
    assert cache.lengths == [6]


# ---- another vocabulary ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [150, 230])
@torch.no_grad()
def test_a_vocabulary_that_is_resized_is_the_stock_model_s(size):
    stock, ids = small_stock(small_config(num_hidden_layers=1)), tokens(2, 5) % 150
    model = model_of("all", stock)
    kept, decoder = min(size, 199), model.get_decoder()
    expected = stock(ids).logits[..., :kept]
    model.resize_token_embeddings(size, **({} if V4 else {"mean_resizing": False}))
    found = model(ids).logits
    assert found.shape == (2, 5, size)
    assert (found[..., :kept] - expected).abs().max() < TOLERANCE
    for each in (model, decoder):  # the decoder was made before
        each(torch.tensor([[size - 1]]))
        with pytest.raises(ValueError, match=f"token id {size} is outside the vocabulary of {size}"):
            each(torch.tensor([[size]]))


def test_the_embeddings_of_a_part_are_not_resized():
    """Every rank holds other tokens of the table."""
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=1), ranks=Ranks(Shard(1, 2)))
    for call in (
        lambda: model.resize_token_embeddings(230),
        lambda: model.set_input_embeddings(torch.nn.Embedding(9, 9)),
    ):
        with pytest.raises(UnsupportedError, match="2 ranks share cannot be replaced or resized: do it with tp_size=1"):
            call()


@pytest.mark.parametrize("of", [small_config, pytest.param(mixture_config, marks=needs_mixtures)])
def test_no_weight_of_a_model_that_is_made_from_its_configuration_is_left_as_memory_was(of):
    config = of()
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        model = Qwen2ForCausalLM.of_kind(config)(config)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.2), name
