"""Calls that continue from what a cache holds: what their masks and positions mean, and the room they are given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.cache import FixedKVCache
from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.errors import CacheOverflowError, UnsupportedError
from qwen2_npu.graph.steps import CompiledStep
from qwen2_npu.models import backbone
from qwen2_npu.models.inputs import Rows
from tests.unit.models.test_inputs import state_of
from tests.unit.small import V4, small_config, small_stock, stock_weights
from tests.unit.test_cache import shape
from tests.unit.tokens import assert_same_tokens

SWITCHES = {
    "none": Optimizations.none(),
    "BNSD": Optimizations.up_to("fixed_kv_cache"),
    "BSND": Optimizations.up_to("flash_attention"),
    "masks": Optimizations.up_to("swiglu"),
    "all": Optimizations.all(),
}
TOLERANCE = 2e-4  # as in test_qwen2.py


@pytest.fixture(scope="module")
def stock():
    return small_stock(small_config(num_hidden_layers=2))


@pytest.fixture(scope="module", params=[*SWITCHES, "compiled"])
def model(request, stock):
    """``compiled``: steps go through what compile_model puts in place; no compiler is needed."""
    optimizations = SWITCHES.get(request.param, Optimizations.all())
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    if request.param == "compiled":
        steps = {"prefill": model.prefill_step, "decode": model.decode_step}
        model.compiled_steps = {name: CompiledStep(step, lambda call: call) for name, step in steps.items()}
    return model


@pytest.fixture(scope="module")
def full(stock):
    return Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))


def tokens(rows: int, width: int) -> torch.Tensor:
    return torch.randint(1, 199, (rows, width), generator=torch.Generator().manual_seed(width))


ROWS = {  # what a mask of ten tokens says, as text: 1 a token, 0 padding
    "left padding": ["0001111111", "1111111111"],
    "right padding": ["1111111000", "1111111111"],
    "holes": ["1101110111", "0110111101"],
    "mixed": ["0011011100", "1111101101"],
}


def mask_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def passes(model, ids: torch.Tensor, masks: list[torch.Tensor], cache=None, **others) -> Iterator[torch.Tensor]:
    """Logits of one pass after another; each takes the tokens that its mask has and the one before has not."""
    seen = 0
    for mask in masks:
        width = mask.shape[1]
        output = model(
            ids[:, seen:width], attention_mask=mask, use_cache=True, **{CACHE_NAME: cache}, **others
        )  # fmt: skip
        cache, seen = cache_of(output), width
        yield output.logits


def assert_alike(model, stock, ids: torch.Tensor, masks: list[torch.Tensor]) -> None:
    """The logits of every pass, where its mask has tokens."""
    theirs = passes(stock, ids, masks, DynamicCache())
    seen = 0
    for mask, mine, other in zip(masks, passes(model, ids, masks), theirs, strict=True):
        live = mask[:, seen:].bool()
        assert ((mine - other).abs()[live] < TOLERANCE).all()
        seen = mask.shape[1]


SPLITS = {"at once": [10], "one by one": [6, 7, 8, 9, 10], "in parts": [6, 8, 10]}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_positions_are_counted_as_the_stock_model_counts_them(model, stock, rows, split):
    """Without position_ids: padding takes one, wherever it stands, and a token of a step may be padding, too."""
    mask = mask_of(ROWS[rows])
    assert_alike(model, stock, tokens(2, 10), [mask[:, :width] for width in SPLITS[split]])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rows", ["left padding", "holes"])
@torch.no_grad()
def test_embeddings_are_taken_as_their_ids_are_in_every_pass(model, rows, split):
    """In a prompt whose bucket is longer, too."""
    ids, masks = tokens(2, 10), [mask_of(ROWS[rows])[:, :width] for width in SPLITS[split]]
    of_embeds, cache, seen = [], None, 0
    for mask in masks:
        width = mask.shape[1]
        embeds = model.get_input_embeddings()(ids[:, seen:width])
        output = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **{CACHE_NAME: cache})
        cache, seen = cache_of(output), width
        of_embeds.append(output.logits)
    live = masks[-1].bool()
    assert torch.equal(torch.cat(of_embeds, dim=1)[live], torch.cat(list(passes(model, ids, masks)), dim=1)[live])


@pytest.mark.skipif(V4, reason="4.37.0 masks by itself, and has no positions beside the mask")
@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_positions_of_the_caller_count_in_every_pass(model, stock, split):
    """In a prompt whose bucket is longer, too."""
    ids, places = tokens(2, 10), torch.tensor([[0, 1, 2, 4, 8, 9, 11, 12, 20, 21], [7, 6, 5, 4, 3, 2, 1, 0, 30, 31]])
    caches, seen = [None, DynamicCache()], 0
    for width in SPLITS[split]:
        logits = []
        for index, candidate in enumerate((model, stock)):
            given = {"position_ids": places[:, seen:width], "attention_mask": torch.ones(2, width, dtype=torch.int64)}
            output = candidate(ids[:, seen:width], use_cache=True, **given, **{CACHE_NAME: caches[index]})
            caches[index] = cache_of(output)
            logits.append(output.logits)
        assert (logits[0] - logits[1]).abs().max() < TOLERANCE
        seen = width


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("hidden", [[(0, 4)], [(0, 0), (1, 5)], [(0, 3), (0, 4), (0, 5)]], ids=str)
@torch.no_grad()
def test_a_mask_leaves_out_tokens_that_the_cache_holds(model, stock, hidden, new):
    """In the calls whose mask does so: in the next one they are there again."""
    ids, padded = tokens(2, 6 + 3 * new), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    masks = [torch.cat((padded, torch.ones(2, step * new, dtype=torch.int64)), dim=1) for step in range(4)]
    for row, column in hidden:
        masks[1][row, column] = masks[2][row, column] = 0
    assert_alike(model, stock, ids, masks)


@torch.no_grad()
def test_a_beam_keeps_the_padding_of_its_row(model, stock):
    """After a reorder, too, the mask is compared with what the rows then hold."""
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    order = torch.tensor([1, 0])
    logits = []
    for candidate, cache in ((model, None), (stock, DynamicCache())):
        given = {"attention_mask": mask, CACHE_NAME: cache, "use_cache": True}
        cache = cache_of(candidate(ids, **given))
        cache.reorder_cache(order)
        after = torch.cat((mask[order], torch.ones(2, 1, dtype=torch.int64)), dim=1)
        logits.append(candidate(ids[:, :1], attention_mask=after, **{CACHE_NAME: cache}).logits)
    assert (logits[0] - logits[1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_crop_of_padding_removes_no_token(full):
    cache = full.allocate_cache(2, 16)
    mask = mask_of(ROWS["right padding"])
    full(tokens(2, 10), attention_mask=mask, **{CACHE_NAME: cache})
    cache.crop(-4)
    assert (cache.lengths, cache.seen_tokens) == ([6, 6], 6)
    full(tokens(2, 1), attention_mask=torch.ones(2, 7), **{CACHE_NAME: cache})
    assert cache.lengths == [7, 7]
    for width in (9, 10):  # what stood there before the crop is forgotten, padding included
        full(tokens(2, width - cache.seen_tokens), attention_mask=torch.ones(2, width), **{CACHE_NAME: cache})
    assert cache.lengths == [10, 10]
    cache.crop(-3)
    with pytest.raises(CacheOverflowError, match=r"crop\(-8\)"):
        cache.crop(-8)


def test_the_steps_of_generate_do_not_look_into_masks(full, stock, monkeypatch):
    """They would wait for the device. Theirs are made of one that was looked into, and of ones."""
    monkeypatch.setattr(Rows, "after", lambda *given: pytest.fail("it was looked into"))
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, **options}
        answers = []
        for candidate in (full, stock):
            torch.manual_seed(1)
            answers.append(candidate.generate(ids, **call))
        assert torch.equal(*answers)


@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_padding_that_no_slot_holds_cannot_become_a_token(full, new):
    cache = full.allocate_cache(2, 16)
    full(tokens(2, 10), attention_mask=mask_of(ROWS["left padding"]), **{CACHE_NAME: cache})
    before = state_of(cache)
    step = partial(full, tokens(2, new), **{CACHE_NAME: cache})
    wanted = rf"pass attention_mask \(batch, past \+ new tokens\) = \(2, {10 + new}\) with 0 at all padding"
    with pytest.raises(UnsupportedError, match=rf"^token 0 of row 0 was padding .*{wanted}"):
        step(attention_mask=torch.ones(2, 10 + new))
    with pytest.raises(UnsupportedError, match=rf"without an attention_mask they would count: {wanted}"):
        step()
    assert all(map(torch.equal, state_of(cache), before))


@pytest.mark.skipif(V4, reason="4.37.0 has no sliding window here")
@torch.no_grad()
def test_holes_within_a_sliding_window_are_as_stock_or_refused():
    stock = small_stock(small_config(use_sliding_window=True, sliding_window=4, max_window_layers=1))
    models = [
        Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
        for optimizations in (Optimizations.none(), Optimizations.all())
    ]
    for name, rows in ROWS.items():
        for split in ([10], [6, 10]):
            masks = [mask_of(rows)[:, :width] for width in split]
            assert_alike(models[0], stock, tokens(2, 10), masks)
            if name in ("left padding", "right padding"):
                assert_alike(models[1], stock, tokens(2, 10), masks)
                continue
            with pytest.raises(UnsupportedError, match=r"^row 0 has padding between its tokens, .* window of 4"):
                list(passes(models[1], tokens(2, 10), masks))


# ---- generate from a cache
@pytest.mark.skipif(V4, reason="4.37.0's generate does not continue from a Cache object")
@pytest.mark.parametrize("written", ["as padding", "as tokens"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_after_a_prefix_with_padding(model, stock, written, options):
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    ids, beams, answers = tokens(2, 8), options.get("num_beams", 1), []
    for candidate, cache in ((model, model.allocate_cache(2 * beams, 32)), (stock, DynamicCache())):
        prefix, seen = ids[:, :6].repeat_interleave(beams, 0), mask[:, :6].repeat_interleave(beams, 0)
        with torch.no_grad():
            given = {"attention_mask": seen} if written == "as padding" else {}
            counted = (seen.cumsum(1) - 1).clamp(min=0)
            candidate(prefix, position_ids=counted, use_cache=True, **given, **{CACHE_NAME: cache})
        call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
        answers.append(candidate.generate(ids, **call, **{CACHE_NAME: cache}))
    assert torch.equal(*answers)


@pytest.mark.parametrize("wide", [True, False], ids=["the whole sequence", "the new tokens alone"])
@pytest.mark.parametrize(("held", "new", "capacity"), [(120, 4, 128), (120, 5, 256), (0, 5, 256)])
def test_a_cache_grows_to_what_generate_has_settled_on(model, stock, wide, held, new, capacity):
    """Before the first token: none is lost, and the call is not refused. What of the prompt is new counts, too, and the
    last new token does not."""
    ids = tokens(1, 125)
    theirs = stock.generate(ids, max_new_tokens=new, do_sample=False)
    cache = model.allocate_cache(1, 120)
    if held:
        with torch.no_grad():
            model(ids[:, :held], **{CACHE_NAME: cache})
    given = ids if wide else ids[:, held:]
    answer = model.generate(
        given, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, past_key_values=cache
    )
    assert torch.equal(answer[:, -new:], theirs[:, -new:])
    if isinstance(cache, FixedKVCache):
        assert cache.shape.capacity == capacity
        assert [tensor.shape[cache.shape.slot_axis] for tensor in cache.key_cache] == [capacity] * 2


def test_a_cache_grows_by_its_longest_row(full):
    ids, mask = tokens(2, 125), torch.ones(2, 125, dtype=torch.int64)
    mask[0, :60] = 0
    cache = full.allocate_cache(2, 125)
    full.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, past_key_values=cache)
    assert cache.lengths == [65, 125]
    more = torch.cat((ids, tokens(2, 1)), dim=1)
    full.generate(
        more, attention_mask=torch.cat((mask, mask[:, -1:]), dim=1), max_new_tokens=4, do_sample=False,
        past_key_values=cache,
    )  # fmt: skip
    assert cache.shape.capacity == 256


def test_no_room_to_grow_is_said_before_the_first_token(full, monkeypatch):
    class Streamer(BaseStreamer):
        got = 0

        def put(self, value):
            self.got += value.numel()

        def end(self):
            pass

    ids, streamer, cache = tokens(1, 100), Streamer(), full.allocate_cache(1, 120)
    with torch.no_grad():
        full(ids, **{CACHE_NAME: cache})
    before = state_of(cache)
    allocate = torch.zeros
    monkeypatch.setattr(
        torch, "zeros",
        lambda *size, **options: allocate(*size, **options) if 256 not in size[0:1] + tuple(size[0]) else fail(),
    )  # fmt: skip

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(MemoryError, match="no room for the KV cache"):
        full.generate(
            torch.cat((ids, ids[:, :5]), dim=1), max_new_tokens=80, do_sample=False, past_key_values=cache,
            streamer=streamer,
        )  # fmt: skip
    monkeypatch.undo()
    assert streamer.got == 105  # the prompt
    assert all(map(torch.equal, state_of(cache), before))


@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_a_cache_that_grew_is_one_that_was_large_from_the_start(layout):
    """In all that it holds and knows, padding included, and in what later steps make of it."""
    padding = torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [0, 0, 0, 1, 1]]).bool()
    small, large = (FixedKVCache(shape(layout=layout, sliding_window=3, capacity=size)) for size in (128, 256))

    def step(new_lengths: list[int], tokens: int, padding: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(tokens)
        states = torch.randn(4, 3, tokens, 2, 4, generator=generator)
        for cache in (small, large):
            with cache.step(new_lengths, tokens, padding=padding) as past:
                for tensor, own in zip(cache.key_cache + cache.value_cache, states, strict=True):
                    by_slot = tensor if layout == "BSND" else tensor.transpose(1, 2)
                    for row, (start, count) in enumerate(zip(past, new_lengths, strict=True)):
                        by_slot[row, start : start + count] = own[row, :count]

    step([2, 5, 3], 5, padding)
    small.grow(128)
    assert small.shape.capacity == 128
    small.grow(129)
    for more in (None, ([1, 1, 1], 1), ([4, 4, 4], 4)):
        if more is not None:
            step(*more)
        assert small.shape == large.shape
        assert all(map(torch.equal, state_of(small), state_of(large)))


def test_a_full_cache_names_the_calls_that_work(full):
    cache = full.allocate_cache(1, 120)
    with torch.no_grad():
        full(tokens(1, 120), **{CACHE_NAME: cache})
        with pytest.raises(CacheOverflowError, match=r"9 new tokens after 120 .* call grow\(129 or more\)"):
            full(tokens(1, 9), **{CACHE_NAME: cache})
        cache.grow(129)
        full(tokens(1, 9), **{CACHE_NAME: cache})


@torch.no_grad()
def test_a_cache_that_generate_filled_takes_one_token_more(full):
    """125 tokens and 4 new ones, of which the last is not computed, are 128 slots: a bucket, and nothing left."""
    done = full.generate(tokens(1, 125), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = cache_of(done)
    assert cache.lengths == [128]
    full(done.sequences[:, -1:], **{CACHE_NAME: cache})
    assert cache.lengths == [129]


@torch.no_grad()
def test_a_compiled_prompt_is_never_longer_than_its_cache():
    """Of 1100 tokens the bucket ends at 1280, and the cache at 1152."""
    config = small_config(num_hidden_layers=1, max_position_embeddings=2048)
    model = Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config)))
    lengths: list[int] = []

    def prefill(given, *rest):
        lengths.append(given.shape[1])
        return model.prefill_step(given, *rest)

    model.compiled_steps = {"prefill": prefill}
    for width, computed in ((1000, 1024), (1100, 1152)):
        ids, cache = tokens(1, width), model.allocate_cache(1, width)
        found = model(ids, logits_to_keep=1, **{CACHE_NAME: cache}).logits
        assert lengths.pop() == computed <= cache.shape.capacity
        assert cache.lengths == [width]
        expected = model(ids, logits_to_keep=1, use_cache=False).logits
        assert (found - expected).abs().max() < TOLERANCE


def test_guidance_has_a_cache_of_its_own_for_as_many_tokens(full, stock, monkeypatch):
    """The processor calls forward within generate, and forward allocates: for how many, it cannot know otherwise."""
    monkeypatch.setattr(backbone, "DEFAULT_HEADROOM", 1)
    ids, other = tokens(1, 5), tokens(1, 125)
    call = {"max_new_tokens": 10, "do_sample": False, "guidance_scale": 1.2, "negative_prompt_ids": other}
    assert_same_tokens(full.generate(ids, **call), stock.generate(ids, **call))


def test_positions_that_a_caller_gives_to_generate_go_on(model):
    """On every version; 4.37.0's own model does not take them. Those beyond the last are not begun."""
    ids, places = tokens(2, 6), torch.tensor([[0, 1, 1, 2, 3, 5], [0, 2, 4, 6, 8, 9]])
    answer = model.generate(ids, position_ids=places, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        after = places[:, -1:] + torch.arange(1, 4)
        logits = model(answer[:, :-1], position_ids=torch.cat((places, after), dim=1)).logits
    assert torch.equal(logits[:, 5:].argmax(-1), answer[:, 6:])
    with pytest.warns(UserWarning, match=r"^40 new tokens .* 8 are generated at most"):
        answer = model.generate(ids, position_ids=places + 495, max_new_tokens=40, do_sample=False)
    assert answer.shape == (2, 14)


@pytest.mark.parametrize("new", [[[200]], [[-1]], [[3, 200]], [[3, -1]]], ids=str)
def test_ids_outside_the_vocabulary_in_a_continuation(model, new):
    cache, ids = model.allocate_cache(1, 32), tokens(1, 5)
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE_NAME: cache})
    for given, past in ((torch.cat((ids, torch.tensor(new)), dim=1), {CACHE_NAME: cache}), (torch.tensor(new), {})):
        for options in ({}, {"repetition_penalty": 1.2}):
            with pytest.raises(ValueError, match=r"token id (200|-1) is outside the vocabulary of 199"):
                model.generate(given, max_new_tokens=3, do_sample=False, **options, **past)
    earlier = torch.cat((torch.tensor([[300]]), ids[:, 1:], ids), dim=1)
    with pytest.raises(ValueError, match="token id 300 is outside"):  # one that the cache holds under another id
        model.generate(earlier, max_new_tokens=2, do_sample=False, repetition_penalty=1.2, past_key_values=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_a_pass_that_fails_leaves_either_cache_as_it_was(model, new, monkeypatch):
    """In the last layer, when the others have written."""
    ids = tokens(2, 6 + new)
    cache = cache_of(model(ids[:, :6], use_cache=True))
    expected = model(ids).logits[:, 6:]
    with monkeypatch.context() as broken:
        broken.setattr(model.model.layers[-1].mlp, "forward", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 6:], **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 6
    assert (model(ids[:, 6:], **{CACHE_NAME: cache}).logits - expected).abs().max() < TOLERANCE
