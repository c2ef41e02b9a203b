"""scatter_update_ and scatter_update: slices, aliasing, bounds, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.ops.support import Recorder, compiled

npu = torch.ops.npu


def expected(data: Tensor, starts: list[int], updates: Tensor, axis: int) -> Tensor:
    out = data.clone()
    for row, start in enumerate(starts):
        out[row].narrow(axis - 1, start, updates.shape[axis]).copy_(updates[row])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("axis", [1, 2, 3, -2])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("starts", [[0, 0, 0], [2, 2, 2], [4, 0, 2], [4, 1, 4], [1, 1, 3], [1, 4], [3]])
def test_writes_one_slice_per_row(
    dtype: torch.dtype, index_dtype: torch.dtype, axis: int, length: int, starts: list[int]
) -> None:
    data = torch.randint(-9, 9, (3, 7, 7, 7)).to(dtype)
    shape = [len(starts), 7, 7, 7]
    shape[axis] = length
    updates = torch.randint(-9, 9, shape).to(dtype)
    want = expected(data, starts, updates, axis % 4)
    indices = torch.tensor(starts, dtype=index_dtype)
    before = data.clone()
    assert torch.equal(npu.scatter_update(data, indices, updates, axis), want)
    assert torch.equal(data, before)
    assert npu.scatter_update_(data, indices, updates, axis).data_ptr() == data.data_ptr()
    assert torch.equal(data, want)


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("starts", [[1, 2], [2, 2], [2]])
def test_updates_may_have_more_rows_than_indices(starts: list[int], length: int) -> None:
    data, updates = torch.zeros(3, 12, 2), torch.randn(3, length, 2)
    npu.scatter_update_(data, torch.tensor(starts), updates, 1)
    assert torch.equal(data, expected(torch.zeros(3, 12, 2), starts, updates, 1))


def test_row_count_does_not_change_the_number_of_calls() -> None:
    counts = set()
    for rows in (2, 64):
        data, updates = torch.zeros(rows, 8, 4), torch.randn(rows, 1, 4)
        with Recorder() as recorder:
            npu.scatter_update_(data, torch.arange(rows) % 8, updates, 1)
        counts.add(len(recorder.calls))
    assert len(counts) == 1


@pytest.mark.parametrize("start", [-1, 5, 100])
def test_out_of_range_raises_before_anything_is_written(start: int) -> None:
    data = torch.zeros(2, 6, 3)
    with pytest.raises(IndexError, match=rf"indices\[1\] is {start}, and 2 entries from there leave axis 1 .* has 6"):
        npu.scatter_update_(data, torch.tensor([0, start]), torch.ones(2, 2, 3), 1)
    assert not data.any()


@pytest.mark.parametrize(
    ("indices", "updates", "axis", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(2, 1, 3), 0, "axis is 0"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 3), 3, "axis is 3"),
        (torch.zeros(2), torch.zeros(2, 1, 3), 1, "indices is .* int32 or int64"),
        (torch.zeros(2, 1).long(), torch.zeros(2, 1, 3), 1, "indices is .* 1 dimension"),
        (torch.tensor(0), torch.zeros(1, 1, 3), 1, "indices is .* 1 dimension"),
        (torch.zeros(3).long(), torch.zeros(3, 1, 3), 1, "at most one per row of the input, which has 2"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 3).half(), 1, "updates is .* the dtype of the first input"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 4), 1, "updates is"),
        (torch.zeros(2).long(), torch.zeros(2, 7, 3), 1, "at most as long along axis 1"),
        (torch.zeros(2).long(), torch.zeros(2, 3), 1, "updates is"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 3, 1), 1, "updates is"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 2), 1, "updates is"),
        (torch.zeros(2).long(), torch.zeros(1, 1, 3), 1, "updates is"),
        (torch.zeros(2).long(), torch.zeros(3, 1, 3), 1, "updates is"),
        (torch.zeros(1).long(), torch.zeros(3, 1, 3), 1, "updates is"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 3), -3, "axis is -3"),
        (torch.zeros(2).long(), torch.zeros(2, 1, 3), -4, "axis is -4"),
    ],
)
def test_errors(indices: Tensor, updates: Tensor, axis: int, message: str) -> None:
    for name in ("scatter_update", "scatter_update_"):
        with pytest.raises(ValueError, match=f"npu::{name}: .*{message}"):
            getattr(npu, name)(torch.zeros(2, 6, 3), indices, updates, axis)


@pytest.mark.parametrize("axis", [1, 2])
def test_compiled_mutates_the_cache_and_serves_every_position(axis: int) -> None:
    def function(cache: Tensor, indices: Tensor, updates: Tensor) -> Any:
        npu.scatter_update_(cache, indices, updates, axis)
        return cache.sum()

    fast, counter = compiled(function)
    shape = [2, 2, 2, 4]
    shape[axis] = 32
    cache = torch.zeros(shape)
    for step in range(10):
        starts = [step, 2 * step]
        shape[axis] = 1
        updates = torch.randn(shape)
        want = expected(cache, starts, updates, axis)
        fast(cache, torch.tensor(starts), updates)
        assert torch.equal(cache, want)
    assert counter.frame_count == 1


# ---- a cache of blocks ----------------------------------------------------------------------------------------------
def paged(tokens: int, blocks: int = 3, block: int = 5) -> tuple[Tensor, ...]:
    """k, v and their caches."""
    return (
        torch.randn(tokens, 2, 4), torch.randn(tokens, 2, 4), torch.randn(blocks, block, 2, 4),
        torch.randn(blocks, block, 2, 4),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["Norm", None])
@pytest.mark.parametrize("slots", [[7], [14, 0, 5], list(range(15))])
def test_each_token_is_written_to_its_slot_and_nothing_else(slots: list[int], mode: str | None) -> None:
    key, value, *caches = paged(len(slots))
    want = [cache.clone() for cache in caches]
    for states, cache in zip((key, value), want, strict=True):
        cache.view(-1, 2, 4)[slots] = states
    before = [cache.clone() for cache in caches]
    found = npu.npu_scatter_pa_kv_cache_functional(key, value, *caches, torch.tensor(slots), cache_mode=mode)
    for cache, other, wanted, old in zip(caches, found, want, before, strict=True):
        assert torch.equal(other, wanted)
        assert torch.equal(cache, old)
    assert npu.npu_scatter_pa_kv_cache(key, value, *caches, torch.tensor(slots), cache_mode=mode) is None
    assert all(map(torch.equal, caches, want))


def test_blocks_write_what_rows_of_a_fixed_cache_write() -> None:
    """A cache (B, C, K, D) is B blocks of C slots: row b writes at b·C + pos."""
    key, value, *caches = paged(3)
    rows = [cache.clone() for cache in caches]
    at = torch.tensor([4, 0, 2])
    npu.npu_scatter_pa_kv_cache(key, value, *caches, torch.arange(3) * 5 + at, cache_mode="Norm")
    for states, cache in zip((key, value), rows, strict=True):
        npu.scatter_update_(cache, at, states[:, None], 1)
    assert all(map(torch.equal, caches, rows))


@pytest.mark.parametrize("slot", [-1, 15, 1000])
def test_a_slot_that_is_not_in_the_cache_is_refused_before_anything_is_written(slot: int) -> None:
    for slots in ([slot], [0, slot]):
        key, value, *caches = paged(len(slots))
        before = [cache.clone() for cache in caches]
        with pytest.raises(IndexError, match=rf"slot_mapping\[{len(slots) - 1}\] is {slot}; .* 3 blocks of 5 slots"):
            npu.npu_scatter_pa_kv_cache(key, value, *caches, torch.tensor(slots), cache_mode="Norm")
        assert all(map(torch.equal, caches, before))


def test_nz_blocks_are_refused_and_they_are_the_schema_s_default() -> None:
    with pytest.raises(ValueError, match="npu::npu_scatter_pa_kv_cache: cache_mode is 'PA_NZ'; supported: 'Norm'"):
        npu.npu_scatter_pa_kv_cache(*paged(1), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 8)}, "key is .*; supported: 3 dimensions"),
        ({"key": torch.zeros(2, 2, 4, 1)}, "key is .*; supported: 3 dimensions"),
        ({"value": torch.zeros(2, 8)}, r"value is .* tokens and heads, \(2, 2\)"),
        ({"value": torch.zeros(2, 2, 4, 1)}, r"value is .* tokens and heads, \(2, 2\)"),
        *(({"value": torch.zeros(*shape, 4)}, r"value is .* tokens and heads, \(2, 2\)")
          for shape in ((1, 2), (3, 2), (2, 1), (2, 3))),
        ({"value": torch.zeros(2, 2, 4).half()}, "value is .* the dtype of the first input"),
        *(({"slot_mapping": torch.zeros(shape).long()}, r"slot_mapping is .*; supported: \(2,\), one slot per token")
          for shape in (1, 3, (2, 1))),
        ({"slot_mapping": torch.zeros(2)}, "slot_mapping is .* int32 or int64"),
        *(({"key_cache": torch.zeros(shape)}, r"key_cache is .*; supported: \(blocks, block, heads, D\)")
          for shape in ((15, 2, 4), (3, 5, 1, 4), (3, 5, 3, 4), (3, 5, 2, 3), (3, 5, 2, 5), (3, 5, 2, 4, 1))),
        *(({"value_cache": torch.zeros(shape)}, r"value_cache is .*; supported: \(3, 5, 2, 4\)")
          for shape in ((15, 2, 4), (2, 5, 2, 4), (4, 5, 2, 4), (3, 4, 2, 4), (3, 6, 2, 4), (3, 5, 2, 3))),
        ({"value_cache": torch.zeros(3, 5, 2, 5)}, r"value_cache is .*; supported: \(3, 5, 2, 4\)"),
    ],
)  # fmt: skip
def test_keys_values_and_blocks_of_another_shape_are_refused(change: dict[str, Tensor], message: str) -> None:
    key, value, key_cache, value_cache = paged(2)
    given = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    given |= {"slot_mapping": torch.tensor([0, 7])}
    for name in ("npu_scatter_pa_kv_cache", "npu_scatter_pa_kv_cache_functional"):
        with pytest.raises(ValueError, match=f"^npu::{name}: {message}"):
            getattr(npu, name)(**given | change, cache_mode="Norm")


def test_heads_of_v_may_have_a_size_of_their_own() -> None:
    key, value = torch.randn(2, 2, 4), torch.randn(2, 2, 6)
    caches = torch.zeros(3, 5, 2, 4), torch.zeros(3, 5, 2, 6)
    npu.npu_scatter_pa_kv_cache(key, value, *caches, torch.tensor([1, 14]), cache_mode="Norm")
    for states, cache in zip((key, value), caches, strict=True):
        assert torch.equal(cache.flatten(0, 1)[[1, 14]], states)


def test_compiled_writes_the_blocks_where_they_lie_and_serves_every_position() -> None:
    def function(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Any:
        npu.npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, slots, cache_mode="Norm")
        return key_cache.sum() + value_cache.sum()

    fast, counter = compiled(function)
    _, _, *caches = paged(2)
    for step in range(5):
        key, value, _, _ = paged(2)
        want = npu.npu_scatter_pa_kv_cache_functional(
            key, value, *caches, torch.tensor([step, 5 + step]), cache_mode="Norm"
        )
        total = fast(key, value, *caches, torch.tensor([step, 5 + step]))
        assert all(map(torch.equal, caches, want))
        torch.testing.assert_close(total, caches[0].sum() + caches[1].sum())
    assert counter.frame_count == 1


def test_fake_tensors() -> None:
    with FakeTensorMode():
        data = torch.zeros(2, 6, 3)
        out = npu.scatter_update(data, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, 3), 1)
    assert out.shape == (2, 6, 3)
