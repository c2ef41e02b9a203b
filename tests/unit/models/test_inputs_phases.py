"""What the mask of a call says of a cache's tokens, the masks of every phase, and which phase a pass is."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.cache import FixedKVCache
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models import inputs
from qwen2_npu.models.inputs import MaskFactory, Rows, fixed_cache_step
from tests.unit.test_cache import shape


# ---- a pass after what a cache holds --------------------------------------------------------------------------------
def cache_after(lengths, tokens, padding=None) -> FixedKVCache:
    cache = FixedKVCache(shape(batch_size=len(lengths), capacity=8))
    with cache.step(lengths, tokens, padding=padding):
        pass
    return cache


PADDED = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
"""The mask of what the cache of the next tests holds: row 0 has its tokens 1, 2 and 4 at slots 0, 1 and 2."""


@pytest.mark.parametrize(
    ("past", "new", "lengths", "hidden"),
    [
        (PADDED, [[1, 1]] * 2, [2, 2], None),
        (PADDED, [[0, 1], [1, 1]], [1, 2], None),
        ([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]], [[1, 1]] * 2, [2, 2], [(0, 0)]),
        ([[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]], [[1, 1], [0, 0]], [2, 0], [(0, 2), (1, 3), (1, 4)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_rows_after_a_cache_tell_new_padding_and_the_slots_that_are_left_out(past, new, lengths, hidden, dtype):
    cache = cache_after([3, 5], 5, PADDED == 0)
    mask = torch.cat((torch.as_tensor(past), torch.tensor(new)), dim=1)
    rows = Rows.after(cache, mask.to(dtype), 2, 2)
    assert rows.lengths == lengths
    padding = torch.tensor(new) == 0
    assert torch.equal(rows.padding, padding) if padding.any() else rows.padding is None
    slots = None if rows.hidden is None else [tuple(slot) for slot in rows.hidden.nonzero().tolist()]
    assert slots == hidden


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        (0, 3, "^token 3 of row 0 was padding when it was written"),
        (0, 0, "^token 0 of row 0 was padding when it was written"),
        (
            None,
            None,
            r"without an attention_mask they would count: pass attention_mask .* = \(2, 7\) with 0 at",
        ),
    ],
)
def test_padding_that_no_slot_holds_is_never_a_token(row, column, message):
    mask = None
    if row is not None:
        mask = torch.cat((PADDED, torch.ones(2, 2, dtype=torch.int64)), dim=1)
        mask[row, column] = 1
    with pytest.raises(UnsupportedError, match=message):
        Rows.after(cache_after([3, 5], 5, PADDED == 0), mask, 2, 2)


def test_without_a_mask_all_new_tokens_follow_a_cache_without_padding():
    rows = Rows.after(cache_after([5, 5], 5), None, 2, 3)
    assert (rows.order, rows.lengths, rows.padding, rows.hidden) == (None, [3, 3], None, None)


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan")])
@pytest.mark.parametrize("column", [1, 6])
def test_a_mask_after_a_cache_holds_0_and_1(value, column):
    mask = torch.cat((PADDED, torch.ones(2, 2)), dim=1).float()
    mask[1, column] = value
    with pytest.raises(ValueError, match=rf"^attention_mask holds {value}: pass 1 for a token"):
        Rows.after(cache_after([3, 5], 5, PADDED == 0), mask, 2, 2)


def test_a_row_whose_tokens_are_all_in_the_cache_may_have_no_new_one():
    mask = torch.tensor([[1, 0], [1, 1]])
    assert Rows.of(mask, 2, 1, [1, 1]).lengths == [0, 1]
    with pytest.raises(ValueError, match=r"row 0 of the attention_mask has no live token among the 1 new ones"):
        Rows.of(mask, 2, 1, [0, 1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_0_and_1_is_waited_for_once(dtype, monkeypatch):
    monkeypatch.setattr(inputs, "check_mask_values", lambda mask: pytest.fail("it was looked into twice"))
    assert Rows.of(torch.tensor([[1, 1], [0, 1]]).to(dtype), 2, 2).lengths == [2, 1]


# ---- masks of the phases --------------------------------------------------------------------------------------------
CPU = torch.device("cpu")


def drop_of(tokens, past, window=None, slots=None) -> torch.Tensor:
    """(tokens, slots): True where a new token must not look."""
    return torch.tensor([
        [slot > past + token or (window is not None and slot <= past + token - window)
         for slot in range(past + tokens if slots is None else slots)]
        for token in range(tokens)
    ])  # fmt: skip


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("steps", [(), ("fixed_kv_cache",), ("last_token_logits",), ("flash_attention",)])
def test_masks_of_a_prompt_say_all_where_the_operator_derives_nothing(steps, window):
    mask, sliding = MaskFactory(Optimizations.of(steps, with_requirements=True), window).prefill(5, CPU)
    assert torch.equal(mask, drop_of(5, 0))
    assert sliding is None if window is None else torch.equal(sliding, drop_of(5, 0, window))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 4), (3, 0), (3, 4)])
@pytest.mark.parametrize("mask", [None, [[1] * 7, [0, 1, 1, 1, 0, 1, 1]]], ids=["no mask", "padding"])
def test_masks_of_a_growing_cache_are_padding_and_causality(tokens, past, mask, window):
    given = None if mask is None else torch.tensor(mask)[:, : past + tokens]
    found, sliding = MaskFactory(Optimizations.none(), window).growing(given, tokens, past, CPU)
    if mask is None and tokens == 1 and window is None:
        assert found is sliding is None  # nothing is to be dropped
        return
    rows = torch.zeros(1, 1, dtype=torch.bool) if given is None else given == 0
    assert torch.equal(found, (drop_of(tokens, past) | rows[:, None])[:, None])
    assert (
        sliding is None
        if window is None
        else torch.equal(sliding, (drop_of(tokens, past, window) | rows[:, None])[:, None])
    )


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("hidden", [False, True])
def test_masks_of_a_continuation_count_each_row_from_its_own_tokens(window, hidden):
    cache = cache_after([3, 5], 5, PADDED == 0)
    left_out = torch.zeros(2, 8, dtype=torch.bool)
    left_out[1, 2] = hidden
    masks = MaskFactory(Optimizations.all(), window)
    found, sliding = masks.extend(cache, [3, 5], 2, left_out if hidden else None)
    for row, past in enumerate((3, 5)):
        assert torch.equal(found[row, 0], drop_of(2, past, slots=8) | left_out[row])
        if window is not None:
            assert torch.equal(sliding[row, 0], drop_of(2, past, window, slots=8) | left_out[row])
    assert (sliding is None) == (window is None)


@pytest.mark.parametrize(
    ("optimizations", "full", "dimensions"),
    [
        (Optimizations.only("fixed_kv_cache"), True, 4),
        (Optimizations.only("flash_attention"), True, 2),
        (Optimizations.only("ifa_tiling"), False, 2),
        (Optimizations.of(["fused_infer_attention"], with_requirements=True), True, 4),
        (Optimizations.all().replace(fused_infer_attention=True), False, 4),
    ],
    ids=["small", "flash", "tiling", "fused", "fused tiling"],
)
@pytest.mark.parametrize("window", [None, 2])
def test_masks_of_a_decode_step_are_the_cache_s_in_the_shape_of_the_operator(optimizations, full, dimensions, window):
    cache = FixedKVCache(shape(batch_size=2, capacity=8, sliding_window=window))
    with cache.step([3, 5], 5):
        pass
    found = MaskFactory(optimizations, window).decode(cache)
    for mask, own in zip(found, (cache.drop_mask if full else None, cache.sliding_drop_mask), strict=True):
        if own is None:
            assert mask is None
            continue
        assert mask.shape == ((2, 8) if dimensions == 2 else (2, 1, 1, 8))
        assert torch.equal(mask.reshape(2, 8), own)


@pytest.mark.parametrize("optimizations", [Optimizations.all(), Optimizations.all().replace(kv_scatter=False),
                                           Optimizations.all().replace(ifa_tiling=False)])  # fmt: skip
@pytest.mark.parametrize(
    ("lengths", "new", "length", "hidden", "phase"),
    [
        (None, 3, 3, False, "prefill"), ([0, 0], 3, 4, False, "prefill"), ([0, 0], 1, 1, False, "prefill"),
        ([3, 0], 2, 2, False, "extend"), ([3, 5], 1, 1, True, "extend"), ([3, 5], 1, 1, False, "decode"),
        ([3, 0], 1, 1, False, "decode"),
    ],
)  # fmt: skip
def test_the_phase_of_a_pass_follows_from_the_cache_and_the_tokens(lengths, new, length, hidden, phase, optimizations):
    cache = None if lengths is None else FixedKVCache(shape(batch_size=2, capacity=8))
    if lengths is not None and any(lengths):
        with cache.step(lengths, 5):
            pass
    rows = Rows(None, [new, new], hidden=torch.zeros(2, 8, dtype=torch.bool) if hidden else None)
    with fixed_cache_step(cache, rows, new, length, None, MaskFactory(optimizations, None), CPU) as (found, given):
        assert found == phase
        seen = 5 if lengths is not None and any(lengths) else 0
        assert given.position_ids.tolist() == [list(range(seen, seen + length))] * 2
        assert given.write_index is (None if cache is None else cache.write_index)
        live = {"extend": [n + length for n in lengths or []], "decode": [n + 1 for n in lengths or []]}.get(phase)
        assert given.actual_seq_lengths == (live if phase == "extend" or optimizations.ifa_tiling else None)
        decodes_by_slots = phase == "decode" and optimizations.kv_scatter
        assert (given.slots is None) == (not decodes_by_slots)
        if decodes_by_slots:
            assert given.slots.tolist() == [lengths[0], 8 + lengths[1]]
