"""FixedKVCache: accounts, masks, overflow, reuse of memory."""

from __future__ import annotations

from unittest import TestCase

import pytest
import torch

from qwen2_npu.cache import CAPACITY_BUCKET, CacheShape, FixedKVCache, human_bytes, round_capacity, round_prompt
from qwen2_npu.errors import CacheOverflowError


def shape(**changes) -> CacheShape:
    values = {
        "layers": 2, "batch_size": 3, "capacity": CAPACITY_BUCKET, "kv_heads": 2, "head_dim": 4, "layout": "BSND",
        "dtype": torch.float32, "device": torch.device("cpu"), "sliding_window": None,
    }  # fmt: skip
    return CacheShape(**(values | changes))


def live_slots(mask: torch.Tensor) -> list[list[int]]:
    return [(~row).nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 128), (128, 128), (129, 256), (1000, 1024)])
def test_capacity_is_rounded_up_to_its_bucket(tokens, capacity):
    assert round_capacity(tokens) == capacity


def test_prompts_of_one_bucket_share_a_length():
    assert [round_prompt(n, 4096) for n in (1, 8, 9, 33, 64, 65, 130, 1024, 1025)] == [
        8, 8, 16, 40, 64, 80, 160, 1024, 1280,
    ]  # fmt: skip
    assert round_prompt(1050, 1152) == 1152
    assert all(n <= round_prompt(n, 1 << 20) <= max(8, 1.25 * n + 8) for n in range(1, 3000))
    assert len({round_prompt(n, 1 << 20) for n in range(1, 4097)}) < 40


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (5 << 20, "5 MiB"),
        (3 << 30, "3 GiB"), (7 << 40, "7 TiB"), (3 << 50, "3072 TiB"), (12345678, "11.77 MiB"), (0.5, "0.5 B"),
    ],
)  # fmt: skip
def test_bytes_are_told_in_the_largest_unit_of_which_there_is_one(count, text):
    assert human_bytes(count) == text


def test_memory_is_estimated_exactly_and_reported_before_allocation():
    with TestCase().assertLogs("qwen2_npu.cache", "INFO") as logs:
        cache = FixedKVCache(shape(dtype=torch.bfloat16))
    tensors = cache.key_cache + cache.value_cache
    assert sum(t.numel() * t.element_size() for t in tensors) == cache.shape.nbytes
    assert human_bytes(cache.shape.nbytes) in "".join(logs.output)


@pytest.mark.parametrize(("layout", "expected"), [("BSND", (3, 128, 2, 4)), ("BNSD", (3, 2, 128, 4))])
def test_layouts(layout, expected):
    cache = FixedKVCache(shape(layout=layout, layers=3))
    assert [tensor.shape for tensor in cache.key_cache] == [tensor.shape for tensor in cache.value_cache]
    assert [tensor.shape for tensor in cache.key_cache] == [expected] * 3


def test_slots_are_counted_over_all_rows():
    """As one operator writes them: of a tensor (batch · capacity, …)."""
    cache = FixedKVCache(shape())
    with cache.step([2, 5, 3], 5):
        assert cache.slots.tolist() == [0, 128, 256]
    assert cache.slots.tolist() == [2, 133, 259]


def test_masks_and_write_positions_follow_ragged_rows():
    cache = FixedKVCache(shape())
    with cache.step([2, 5, 3], 5) as past:
        assert (past, cache.lengths, cache.seen_tokens, cache.write_index.tolist()) == ([0] * 3, [2, 5, 3], 0, [0] * 3)
    assert live_slots(cache.drop_mask) == [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2]]
    assert (cache.lengths, cache.seen_tokens, cache.write_index.tolist()) == ([2, 5, 3], 5, [2, 5, 3])
    with cache.step([1, 1, 1], 1):
        pass
    assert live_slots(cache.drop_mask) == [[0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    assert (cache.lengths, cache.seen_tokens, cache.write_index.tolist()) == ([3, 6, 4], 6, [3, 6, 4])


@pytest.mark.parametrize(("lengths", "tokens"), [([1, 3, 2], 3), ([2, 0, 1], 2), ([1, 1, 1], 1)])
@pytest.mark.parametrize("masks", [True, False])
def test_masks_move_one_slot_per_step_and_equal_rebuilt_ones(lengths, tokens, masks):
    """Also from the first token of a row on. That of the window is read in every decode step."""
    cache = FixedKVCache(shape(sliding_window=3))
    with cache.step(lengths, tokens):
        pass
    for count in range(7):
        assert cache.lengths == [length + count for length in lengths] == cache.write_index.tolist()
        if masks:
            assert live_slots(cache.drop_mask) == [list(range(length)) for length in cache.lengths]
        expected = [list(range(max(0, length - 3), length)) for length in cache.lengths]
        assert live_slots(cache.sliding_drop_mask) == expected
        with cache.step([1, 1, 1], 1, masks=masks):
            pass


def test_overflow_and_other_batch_sizes_raise_before_anything_changes():
    cache = FixedKVCache(shape())
    with cache.step([100, 120, 90], 120):
        pass
    before = (list(cache.lengths), cache.seen_tokens, cache.drop_mask.clone())
    with pytest.raises(
        CacheOverflowError,
        match=r"9 new tokens after 120 do not fit the KV cache of 128 slots; call grow\(129 or more\) .* "
        r"allocate_cache\(batch_size=3, capacity=129 or more\)",
    ):
        cache.check_room(3, 9)
    for rows in (2, 4):
        with pytest.raises(
            CacheOverflowError, match=rf"{rows} rows .* allocated for 3; allocate_cache\(batch_size={rows}, capacity=…"
        ):
            cache.check_room(rows, 1)
    cache.check_room(3, 8)
    assert (cache.lengths, cache.seen_tokens) == before[:2]
    assert torch.equal(cache.drop_mask, before[2])


def test_reset_keeps_addresses_and_clears_contents():
    cache = FixedKVCache(shape())
    addresses = [tensor.data_ptr() for tensor in cache.key_cache]
    tensors = cache.key_cache + cache.value_cache
    for tensor in tensors:
        tensor.fill_(float("nan"))
    with cache.step([2, 4, 3], 4, padding=torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()):
        pass
    cache.reset()
    assert [tensor.data_ptr() for tensor in cache.key_cache] == addresses
    assert not any(tensor.any() for tensor in tensors)  # NaN is not zero
    assert (cache.lengths, cache.seen_tokens, bool(cache.drop_mask.all())) == ([0, 0, 0], 0, True)
    assert (cache.write_index.tolist(), cache.padding) == ([0, 0, 0], None)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 4, 3]])
def test_reorder_moves_live_rows_in_place(lengths):
    cache = FixedKVCache(shape())
    for tensor in cache.key_cache + cache.value_cache:
        tensor.normal_()
    with cache.step(lengths, 4):
        pass
    before = [tensor.clone() for tensor in cache.key_cache]
    address = cache.key_cache[0].data_ptr()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.key_cache[0].data_ptr() == address
    assert cache.lengths == [lengths[2], lengths[0], lengths[0]] == cache.write_index.tolist()
    for old, new in zip(before, cache.key_cache, strict=True):
        assert torch.equal(new[:, :4], old[[2, 0, 0], :4])


def test_a_reorder_that_fails_half_way_leaves_an_empty_cache(monkeypatch):
    """Rows that others have overwritten are gone: what is left must not be taken for a past."""
    cache = FixedKVCache(shape())
    with cache.step([4, 6, 5], 6):
        pass
    moved = iter([None, None, KeyboardInterrupt])
    select = torch.Tensor.index_select

    def interrupted(tensor, *arguments):
        if (error := next(moved)) is not None:
            raise error
        return select(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "index_select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert (cache.lengths, cache.seen_tokens, cache.write_index.tolist()) == ([0] * 3, 0, [0] * 3)
    assert cache.drop_mask.all()


def test_crop_forgets_the_last_tokens():
    cache = FixedKVCache(shape())
    with cache.step([4, 6, 5], 6):
        pass
    cache.crop(-3)
    assert (cache.lengths, cache.seen_tokens) == ([1, 3, 2], 3)
    assert live_slots(cache.drop_mask) == [[0], [0, 1, 2], [0, 1]]
    with pytest.raises(
        CacheOverflowError, match=r"crop\(-2\) of rows of \[1, 3, 2\] tokens: a row has fewer tokens to remove"
    ):
        cache.crop(-2)


@pytest.mark.parametrize("early", [False, True], ids=["", "to a length"])
@pytest.mark.parametrize("kept", range(8))
def test_crop_takes_padding_with_the_tokens(kept, early):
    """Counted row by row, also where every row has some; what was seen after the prompt is no padding."""
    prompt = [[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
    cache = FixedKVCache(shape())
    with cache.step([row.count(0) for row in prompt], 5, padding=torch.tensor(prompt).bool()):
        pass
    for _ in range(2):
        with cache.step([1, 1, 1], 1):
            pass
    if kept or not early:  # 0 is a number of tokens to remove
        cache.crop(kept if early else kept - 7)
        seen = [[*row, 0, 0][:kept] for row in prompt]
        assert cache.lengths == [row.count(0) for row in seen] == cache.write_index.tolist()
        assert live_slots(cache.drop_mask) == [list(range(length)) for length in cache.lengths]
        assert cache.seen_tokens == kept
        assert cache.padding_of(kept).int().tolist() == seen


@pytest.mark.parametrize("removed", [8, 9, 12, 100])
def test_crop_of_more_than_there_was_changes_nothing(removed):
    prompt = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    for padding, lengths in ((None, [5, 5, 5]), (prompt, [3, 5, 0])):
        cache = FixedKVCache(shape())
        with cache.step(lengths, 5, padding=padding):
            pass
        with cache.step([1, 1, 1], 1):
            pass
        with pytest.raises(CacheOverflowError, match=rf"crop\(-{removed}\) of rows of .* a row has fewer tokens"):
            cache.crop(-removed)
        assert (cache.lengths, cache.seen_tokens) == ([length + 1 for length in lengths], 6)
        assert (cache.padding is None) == (padding is None)


def test_crop_to_a_length_as_early_releases_of_transformers_5_ask_for():
    cache = FixedKVCache(shape())
    with cache.step([4, 6, 5], 6):
        pass
    cache.crop(7)
    assert cache.lengths == [4, 6, 5]
    cache.crop(3)
    assert (cache.lengths, cache.seen_tokens) == ([1, 3, 2], 3)
    with pytest.raises(CacheOverflowError, match="a row has fewer tokens to remove"):
        cache.crop(1)


def test_no_room_on_the_device_is_one_clear_error():
    with pytest.raises(MemoryError, match=r"no room for the KV cache BSND: .* lower the batch size"):
        FixedKVCache(shape(capacity=1 << 44))


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
def test_what_a_failed_step_wrote_is_cleared(layout):
    """Its weight is 0 in a later sum, and 0 times NaN is NaN."""
    cache = FixedKVCache(shape(layout=layout))
    for tensor in cache.key_cache + cache.value_cache:
        tensor.fill_(1)
    with cache.step([4, 2, 4], 4):
        pass

    def fail():
        with cache.step([1, 1, 1], 1):
            for tensor in cache.key_cache + cache.value_cache:
                tensor.narrow(cache.shape.slot_axis, 4, 1).fill_(float("nan"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    for tensor in cache.key_cache + cache.value_cache:
        by_slot = tensor if layout == "BSND" else tensor.transpose(1, 2)
        assert torch.equal(by_slot[:, :, 0, 0] == 1, ~cache.drop_mask)
        assert not by_slot[cache.drop_mask].any()


def test_masks_that_nobody_reads_are_left_alone():
    """A decode step that is told the lengths must not pay for them."""
    cache = FixedKVCache(shape())
    with cache.step([4, 4, 4], 4):
        pass
    before = cache.drop_mask.clone()
    with cache.step([1, 1, 1], 1, masks=False):
        assert cache.lengths == [5, 5, 5]
        assert torch.equal(cache.drop_mask, before)


def test_what_transformers_asks_of_a_cache():
    cache = FixedKVCache(shape())
    assert cache.is_recording_past(0) is True
    assert (cache.is_initialized, cache.is_croppable, cache.is_compileable) == (True, True, False)
    assert cache.is_sliding == cache.is_linear == [False, False]
    assert (len(cache), cache.batch_size, cache.get_max_length(), cache.get_max_cache_shape()) == (2, 3, 128, 128)
    with cache.step([2, 4, 3], 4):
        pass
    assert (cache.get_seq_length(), cache.get_usable_length(1)) == (4, 4)
    assert repr(cache).endswith("; lengths=[2, 4, 3])")
    for change in (lambda: cache.batch_select_indices(torch.tensor([0, 2])), lambda: cache.batch_repeat_interleave(2)):
        with pytest.raises(CacheOverflowError, match="cannot change its number of rows; switch fixed_kv_cache off"):
            change()
