"""Checks of what callers pass, and which positions they keep."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers

from qwen2_npu.compat import growing_cache
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models import arguments
from qwen2_npu.models.inputs import Rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foo": 1}, r"takes no argument foo$"),
        ({"foo": False}, r"takes no argument foo$"),
        ({"foo": 0, "bar": ""}, r"takes no argument foo, bar$"),
        (
            {"foo": 1, "num_items_in_batch": 3},
            r"takes no argument foo, num_items_in_batch; num_items_in_batch: ",
        ),
        (
            {"num_logits_to_keep": 1, "cache_position": 2},
            r"no argument num_logits_to_keep; .*its name is logits_to_keep",
        ),
        ({"num_items_in_batch": 3}, r"num_items_in_batch: the loss is the mean"),
        ({"shift_labels": [[1]]}, r"takes no argument shift_labels; shift_labels: pass labels: they are shifted here$"),
    ],
)
def test_an_argument_without_effect_is_refused(given, message):
    with pytest.raises(TypeError, match=message):
        arguments.check_names(given)


def test_what_generate_hands_to_every_model_is_taken():
    arguments.check_names({"cache_position": torch.arange(3), "tokenizer": object(), "is_first_iteration": True})
    arguments.check_names({"shift_labels": None})


@pytest.mark.parametrize(
    ("name", "value"), [("assistant_early_exit", 4), ("assistant_early_exit", 1), ("use_mtp", True)]
)
def test_options_that_draft_with_layers_of_the_stock_model_are_refused(name, value):
    with pytest.raises(UnsupportedError, match=rf"^{name}={value} drafts with layers of the stock model"):
        arguments.check_generation(SimpleNamespace(**{name: value}))
    for off in (None, False):
        arguments.check_generation(SimpleNamespace(**{name: off}))
    arguments.check_generation(SimpleNamespace())


@pytest.mark.parametrize(
    ("mode", "named"),
    [
        ("assisted_generation", r"^assisted generation \(assistant_model, prompt_lookup_num_tokens\) takes"),
        ("contrastive_search", r"^contrastive search \(penalty_alpha\) takes"),
    ],
)
def test_modes_of_generation_that_take_the_cache_apart_are_refused(mode, named):
    """4.37.0 asks; 5.x has the first of them for other caches."""
    with pytest.raises(
        UnsupportedError, match=rf"{named} the KV cache apart as transformers {transformers.__version__}"
    ):
        arguments.check_mode(mode)
    for other in ("greedy_search", "sample", "beam_search", "group_beam_search"):
        arguments.check_mode(other)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"full_attention": None}, r"attention_mask is a dict: pass a 2-D mask .* = \(2, 5\)"),
        (torch.ones(2, 1, 2, 5), r"shape \(2, 1, 2, 5\): pass a 2-D mask"),
        (torch.ones(3, 5), r"shape \(3, 5\): pass a 2-D mask"),
        (torch.ones(2), r"shape \(2,\): pass a 2-D mask"),
        (torch.ones(1, 5), r"shape \(1, 5\): pass a 2-D mask"),
        (torch.ones(2, 4), r"covers 4 tokens, but 3 are in the cache and 2 are new: pass"),
        (torch.ones(2, 6), r"covers 6 tokens, but 3 are in the cache and 2 are new: pass"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_mask(mask, 2, 3, 2)


IDS, EMBEDS, TABLE = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 4), torch.ones(9, 4)


@pytest.mark.parametrize(
    ("ids", "embeds", "message"),
    [
        ([[1, 2]], None, r"^input_ids is a list: pass a tensor \(batch, tokens\) of token ids$"),
        (IDS.numpy(), None, r"^input_ids is a ndarray: pass a tensor"),
        ("text", None, r"^input_ids is a str: pass a tensor"),
        *(
            (IDS.to(dtype), None, rf"^input_ids holds {dtype}: pass torch.int64 or torch.int32$")
            for dtype in (torch.float32, torch.bool, torch.int16, torch.uint8)
        ),
        (IDS[0], None, r"^input_ids \(batch, tokens\) expected, got shape \(3,\)$"),
        (IDS[None], None, r"^input_ids \(batch, tokens\) expected, got shape \(1, 2, 3\)$"),
        (IDS[:0], None, r"^empty prompt: input_ids \(batch, tokens\) has shape \(0, 3\)"),
        (IDS[:, :0], None, r"^empty prompt: input_ids \(batch, tokens\) has shape \(2, 0\)"),
        (None, [[[1.0]]], r"^inputs_embeds is a list: pass a tensor \(batch, tokens, hidden\) of embeddings$"),
        (None, EMBEDS[0], r"^inputs_embeds \(batch, tokens, hidden\) expected, got shape \(3, 4\)$"),
        (None, EMBEDS[:, :, :2], r"inputs_embeds of shape \(2, 3, 2\): the model has hidden_size=4; pass .* 4\)$"),
        (None, EMBEDS.repeat(1, 1, 2), r"inputs_embeds of shape \(2, 3, 8\): the model has hidden_size=4; pass"),
        (None, EMBEDS.double(), r"^inputs_embeds is torch.float64, the model torch.float32: pass .*\.to"),
        (None, EMBEDS.long(), r"^inputs_embeds is torch.int64, the model torch.float32"),
        (IDS, EMBEDS, r"^pass exactly one of input_ids and inputs_embeds$"),
        (IDS.to("meta"), None, r"^input_ids is on meta, the model on cpu: pass input_ids.to\(model.device\)$"),
        (None, EMBEDS.to("meta"), r"^inputs_embeds is on meta, the model on cpu: pass inputs_embeds.to"),
    ],
)
def test_tokens_that_are_none(ids, embeds, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_tensors(TABLE, len(TABLE), None, ids, embeds, None, None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_that_are_some(dtype):
    assert arguments.check_tensors(TABLE, len(TABLE), None, IDS.to(dtype), None, torch.ones(2, 3), IDS).dtype == dtype
    assert arguments.check_tensors(TABLE, len(TABLE), None, None, EMBEDS, None, IDS[:, :1]) is EMBEDS


@pytest.mark.parametrize("value", [-1e9, 2.0, 0.5, float("nan"), float("-inf")])
def test_a_mask_of_anything_but_0_and_1(value):
    """One that is to be added to the scores would be taken for its opposite."""
    mask = torch.ones(2, 3)
    mask[1, 1] = value
    message = rf"attention_mask holds {value}: pass 1 for a token and 0 for padding"
    for look in (lambda: arguments.check_mask_values(mask), lambda: Rows.of(mask, 2, 3)):
        with pytest.raises(ValueError, match=message):
            look()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_any_dtype(dtype):
    arguments.check_mask_values(torch.tensor([[0, 1, 1]]).to(dtype))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1, 2]], r"^position_ids is a list: pass a tensor \(batch or 1, new tokens\) = \(2 or 1, 3\)$"),
        (torch.arange(2)[None], r"^position_ids of shape \(1, 2\): pass \(batch or 1, new tokens\) = \(2 or 1, 3\)$"),
        (torch.arange(9).view(3, 3), r"^position_ids of shape \(3, 3\): pass"),
        (torch.arange(0).view(0, 3), r"^position_ids of shape \(0, 3\): pass"),
        (torch.arange(3).view(1, 1, 3), r"^position_ids of shape \(1, 1, 3\): pass"),
        (torch.arange(6).view(2, 3, 1), r"^position_ids of shape \(2, 3, 1\): pass"),
        (torch.tensor(3), r"^position_ids of shape \(\): pass"),
        (torch.arange(4), r"^position_ids of shape \(4,\): pass"),
        (torch.arange(3.0)[None], r"^position_ids holds torch.float32: pass torch.int64 or torch.int32$"),
        (torch.arange(3, device="meta"), r"^position_ids is on meta, the model on cpu: pass position_ids.to"),
    ],
)
def test_positions_of_another_form(positions, message):
    with pytest.raises(ValueError, match=message):
        arguments.rows_of_positions(positions, None, IDS)


def test_positions_of_padding_do_not_count():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    rows = arguments.rows_of_positions(torch.tensor([[7, 8, 9]]), mask, IDS)
    assert rows.tolist() == [[7, 8, 9], [0, 8, 9]]
    assert arguments.rows_of_positions(torch.tensor([7, 8, 9]), None, IDS).tolist() == [[7, 8, 9]] * 2
    assert arguments.rows_of_positions(torch.tensor([[5]]), mask, IDS[:, :1]).tolist() == [[5], [5]]
    step = arguments.rows_of_positions(torch.tensor([[5]]), torch.tensor([[1, 1], [1, 0]]), IDS[:, :1])
    assert step.tolist() == [[5], [5]]  # kept: nobody reads the second, and a step has an operator less
    own = [[7, 8, 9], [4, 5, 6]]
    for prompt in (IDS, EMBEDS):
        assert arguments.rows_of_positions(torch.tensor(own), None, prompt).tolist() == own
    assert arguments.rows_of_positions(None, mask, IDS) is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 2, 3]], r"^labels is a list: pass a tensor \(batch, tokens\) of torch.int64, with -100 where none"),
        (IDS[0], r"^labels of shape \(3,\) and torch.int64: pass a tensor"),
        (IDS.float(), r"^labels of shape \(2, 3\) and torch.float32: pass a tensor"),
        (IDS + 9, r"^label 10 is outside the vocabulary of 9"),
        (IDS.clamp(max=0) + 9, r"^label 9 is outside the vocabulary of 9"),
        (IDS.clamp(max=0) - 1, r"^label -1 is outside the vocabulary of 9"),
        (IDS - 5, r"^label -4 is outside the vocabulary of 9"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_labels(labels, 9)
    arguments.check_labels(torch.tensor([[-100, 8]]), 9)


def test_a_cache_that_is_none_or_of_other_rows():
    for cache in ((IDS, IDS), "cache", object()):
        with pytest.raises(ValueError, match=rf"is a {type(cache).__name__}: pass a cache of allocate_cache"):
            arguments.check_cache(cache, 2)
    cache = growing_cache()
    assert arguments.check_cache(cache, 2) is cache
    cache.update(torch.ones(3, 1, 2, 4), torch.ones(3, 1, 2, 4), 0)
    assert arguments.check_cache(cache, 3) is cache
    assert arguments.check_cache(cache, None) is cache
    for batch in (2, 4):
        with pytest.raises(ValueError, match=rf"holds 3 rows, and the batch has {batch}: pass a cache"):
            arguments.check_cache(cache, batch)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("last", r"^logits_to_keep is a str: pass a number of positions, or a tensor of positions from -3 to 2$"),
        (1.5, r"^logits_to_keep is a float"),
        (torch.tensor([1.0]), r"^logits_to_keep is a torch.float32"),
        (torch.tensor([0, 3]), r"^logits_to_keep holds 3"),
        (torch.tensor([-4]), r"^logits_to_keep holds -4"),
        ([0, 7], r"^logits_to_keep holds 7"),
        (torch.tensor([True]), r"^logits_to_keep has \(1,\) booleans for 3 tokens"),
    ],
)
def test_positions_that_no_logits_are_kept_of(keep, message):
    with pytest.raises(ValueError, match=message):
        arguments.kept_positions(keep, 3)


def test_live_tokens_of_the_longest_row():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    assert arguments.live_tokens(mask, 9, 8) == 8
    assert arguments.live_tokens(mask, 8, 8) == 8  # is not looked into
    assert arguments.live_tokens(None, 9, 8) == 9


def test_masks_that_fit():
    arguments.check_mask(None, 2, 3, 2)
    arguments.check_mask(torch.zeros(2, 5), 2, 3, 2)


@pytest.mark.parametrize(
    ("total", "positions", "message"),
    [
        (9, None, r"9 tokens need as many positions, the model has max_position_embeddings=8: shorten"),
        (3, [[0, 8]], r"position_ids holds 8, the model has max_position_embeddings=8"),
        (3, [[-1, 0]], r"position_ids holds -1"),
    ],
)
def test_positions_without_a_row_in_the_table(total, positions, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_positions(8, total, None if positions is None else torch.tensor(positions))


def test_all_positions_of_the_table_may_be_taken():
    arguments.check_positions(8, 8, torch.tensor([[0, 7]]))
    arguments.check_capacity(8, 8)
    with pytest.raises(ValueError, match="need 9 positions, the model has max_position_embeddings=8"):
        arguments.check_capacity(8, 9)


@pytest.mark.parametrize(("token", "fits"), [(0, True), (8, True), (9, False), (-1, False)])
def test_the_vocabulary_ends_with_its_last_token(token, fits):
    ids = torch.tensor([[3, token]])
    calls = {
        "of forward": lambda: arguments.check_vocabulary(ids, 9),
        "of generate": lambda: prompt_checked(input_ids=ids),
        "of guidance": lambda: prompt_checked(input_ids=IDS, negative_prompt_ids=ids),
    }
    for call in calls.values():
        with nullcontext() if fits else pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary"):
            call()


def prompt_checked(past=None, **call):
    arguments.check_prompt(call, torch.device("cpu"), 9, past)


@pytest.mark.parametrize("given", [{"input_ids": IDS}, {"inputs": IDS}, {"inputs_embeds": EMBEDS}], ids="".join)
@pytest.mark.parametrize(("past", "fits"), [(None, True), (0, True), (2, True), (3, False), (4, False)])
def test_a_prompt_that_the_cache_holds_already_is_none(given, past, fits):
    """Of three tokens per row: with two in the cache the third is new."""
    message = rf"3 tokens per row, and the cache holds {past} .* past \+ new tokens\) = \(2, {(past or 0) + 3}\)$"
    for narrow in ({}, {"attention_mask": torch.ones(2, 3)}):
        with nullcontext() if fits else pytest.raises(ValueError, match=message):
            prompt_checked(past, **given, **narrow)
    prompt_checked(past, **given, attention_mask=torch.ones(2, 3 + (past or 0)))
    if past is not None:
        with pytest.raises(ValueError, match=r"^attention_mask of shape \(3, \d\): pass"):
            prompt_checked(past, **given, attention_mask=torch.ones(3, 3 + past + 1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 2), r"^attention_mask covers 2 tokens, but 0 are in the cache and 3 are new"),
        (torch.ones(2, 4), r"^attention_mask covers 4 tokens, but 0 are in the cache and 3 are new"),
        (torch.ones(3, 3), r"^attention_mask of shape \(3, 3\): pass"),
        (torch.ones(2, 1, 3), r"^attention_mask of shape \(2, 1, 3\): pass"),
        (torch.full((2, 3), 2), r"^attention_mask holds 2"),
        (torch.ones(2, 3, device="meta"), r"^attention_mask is on meta, the model on cpu"),
        ([[1, 1, 1]] * 2, r"^attention_mask is a list: pass a tensor \(batch, tokens\) of 0 and 1$"),
        (IDS.numpy(), r"^attention_mask is a ndarray: pass a tensor"),
    ],
)
def test_masks_of_a_prompt_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        prompt_checked(input_ids=IDS, attention_mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(6), torch.ones(2, 1, 6)])
def test_masks_of_other_dimensions_beside_a_cache(mask):
    """They cover nothing of it; nor do they make a prompt one that it does not hold yet."""
    with pytest.raises(ValueError, match=r"^the prompt has 3 tokens per row, and the cache holds 3 already"):
        prompt_checked(3, input_ids=IDS, attention_mask=mask)
    with pytest.raises(ValueError, match=r"^attention_mask of shape \((6,|2, 1, 6)\): pass"):
        prompt_checked(2, input_ids=IDS, attention_mask=mask)


def test_what_is_no_prompt_is_left_to_transformers():
    """It begins with a token of its own, or says what is missing."""
    prompt_checked(3)
    prompt_checked(3, attention_mask=torch.ones(2, 4))


def test_embeddings_of_other_dimensions_are_no_prompt():
    with pytest.raises(ValueError, match=r"^inputs_embeds \(batch, tokens, hidden\) expected, got shape \(3, 4\)$"):
        prompt_checked(inputs_embeds=EMBEDS[0])


@pytest.mark.parametrize("positions", [[[0, 1, 2]] * 2, IDS.numpy()])
def test_positions_of_a_prompt_that_are_no_tensor(positions):
    with pytest.raises(ValueError, match=r"^position_ids is a (list|ndarray): pass a tensor \(batch, tokens\)$"):
        prompt_checked(input_ids=IDS, position_ids=positions)


def test_another_dtype_by_autocast_is_refused():
    """The operators compute in that of the weights: a user would believe otherwise."""
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UnsupportedError, match=r"autocast\(.cpu., dtype=torch.bfloat16\) around a model of"),
    ):
        arguments.check_precision(TABLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arguments.check_precision(TABLE.bfloat16())
    arguments.check_precision(TABLE)


@pytest.mark.parametrize(
    ("keep", "positions"),
    [
        (0, [0, 1, 2, 3, 4]),
        (2, [3, 4]),
        (9, [0, 1, 2, 3, 4]),
        (torch.tensor([-1, 0]), [4, 0]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        (torch.tensor(2), 2),
        ([1, 3], [1, 3]),
        (slice(1, 3), [1, 2]),
        (None, [0, 1, 2, 3, 4]),
    ],
)
def test_kept_positions_are_those_that_the_stock_model_takes(keep, positions):
    kept = arguments.kept_positions(keep, 5)
    assert torch.arange(5)[slice(None) if kept is None else kept].tolist() == positions


def test_a_decode_step_keeps_its_one_position_without_an_index():
    assert arguments.kept_positions(1, 1) is None
