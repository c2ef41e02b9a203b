"""Cache writes: scatter_update_, npu_scatter_pa_kv_cache (both in place), scatter_update and
npu_scatter_pa_kv_cache_functional (copies)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen2_npu.ops.checks import INDEX_DTYPES, check_same_dtype, invalid, is_readable, reject_unsupported


def scatter_update_(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """input[i, …, indices[i] + k, …] = updates[i, …, k, …]: one slice start per batch row.

    Args:
        input: (B, …), any dtype; written in place.
        indices: (n,) int32 or int64, n ≤ B: where row i's slice starts along `axis`.
        updates: rank and dtype of `input`, equal sizes but for `axis` and the batch (n or B rows; n are used).
        axis: not 0.

    Returns:
        `input` itself.

    Raises:
        ValueError: shapes, dtypes or axis do not fit.
        IndexError: a slice leaves `input`. Checked on the CPU in eager mode, where it costs no synchronisation;
            elsewhere such a write is undefined, as on the device, which checks nothing.
    """
    return _write("scatter_update_", input, indices, updates, axis)


def scatter_update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """As `scatter_update_`, on a copy of `input`."""
    return _write("scatter_update", input.clone(), indices, updates, axis)


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **unsupported: Any,
) -> None:
    """cache[slot // block, slot % block] = states, of k and of v: one slot per token, in a cache of blocks.

    Args:
        key, value: (T, K, D) and (T, K, Dv), any dtype.
        key_cache, value_cache: (blocks, block, K, D) and (…, Dv), of that dtype; written in place.
        slot_mapping: (T,) int32 or int64, no slot twice.
        cache_mode: 'Norm', which is also None's meaning. The schema's default, NZ blocks, is not supported.
        unsupported: the schema's remaining arguments.

    Raises:
        ValueError: shapes or dtypes do not fit, or an argument that is not supported.
        IndexError: a slot that is not in the cache. Checked on the CPU in eager mode alone, as in scatter_update_.
    """
    op = "npu_scatter_pa_kv_cache"
    _write_slots(op, key, value, key_cache, value_cache, slot_mapping, cache_mode, unsupported)


def npu_scatter_pa_kv_cache_functional(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """As `npu_scatter_pa_kv_cache`, on copies of the caches, which are returned."""
    op, caches = "npu_scatter_pa_kv_cache_functional", (key_cache.clone(), value_cache.clone())
    _write_slots(op, key, value, *caches, slot_mapping, cache_mode, unsupported)
    return caches


def _write_slots(
    op: str,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    cache_mode: str | None,
    unsupported: dict[str, Any],
) -> None:
    if unsupported:
        reject_unsupported(op, unsupported)
    if cache_mode not in ("Norm", None):
        raise invalid(op, "cache_mode", cache_mode, "'Norm'")
    check_same_dtype(op, key, value=value, key_cache=key_cache, value_cache=value_cache)
    if key.dim() != 3:
        raise invalid(op, "key", key, "3 dimensions, (tokens, heads, D)")
    if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
        raise invalid(op, "value", value, f"(tokens, heads, D) with the key's tokens and heads, {tuple(key.shape[:2])}")
    if slots.dtype not in INDEX_DTYPES or slots.shape != key.shape[:1]:
        raise invalid(op, "slot_mapping", slots, f"({key.shape[0]},), one slot per token, int32 or int64")
    if key_cache.shape[2:] != key.shape[1:]:
        raise invalid(
            op, "key_cache", key_cache, f"(blocks, block, heads, D) of the key's heads and D, {key.shape[1:]}"
        )
    blocks, block = key_cache.shape[:2]
    if value_cache.shape != (blocks, block, *value.shape[1:]):
        raise invalid(op, "value_cache", value_cache, f"{(blocks, block, *value.shape[1:])}")
    if is_readable(slots):
        for token, slot in enumerate(found := slots.tolist()):
            if not 0 <= slot < blocks * block:
                raise IndexError(
                    f"npu::{op}: slot_mapping[{token}] is {slot}; the cache has {blocks} blocks of {block} slots"
                )
        if len(found) == 1 and is_readable(key_cache):
            at = divmod(found[0], block)
            key_cache[at].copy_(key[0])
            value_cache[at].copy_(value[0])
            return
    slots = slots.to(device=key_cache.device, dtype=torch.int64)
    # Two indices and no view of the cache: a compiled graph then writes where it lies.
    where: list[Tensor | None] = [slots // block, slots % block]
    torch.ops.aten.index_put_(key_cache, where, key)
    torch.ops.aten.index_put_(value_cache, where, value)


def _check(op: str, data: Tensor, indices: Tensor, updates: Tensor, axis: int) -> int:
    """The axis, counted from the front."""
    rank = data.dim()
    if not -rank <= axis < rank or axis % rank == 0:
        raise invalid(op, "axis", axis, f"a dimension of the input other than 0, below {rank}")
    axis %= rank
    if indices.dtype not in INDEX_DTYPES or indices.dim() != 1:
        raise invalid(op, "indices", indices, "1 dimension, int32 or int64")
    check_same_dtype(op, data, updates=updates)
    rows = indices.shape[0]
    if rows > data.shape[0]:
        raise invalid(op, "indices", indices, f"at most one per row of the input, which has {data.shape[0]}")
    fits = (
        updates.dim() == rank
        and (updates.shape[0] == rows or updates.shape[0] == data.shape[0])
        and all(d == axis or updates.shape[d] == data.shape[d] for d in range(1, rank))
        and updates.shape[axis] <= data.shape[axis]
    )
    if not fits:
        shape = tuple(data.shape)
        raise invalid(op, "updates", updates, f"the input's {shape}, at most as long along axis {axis}")
    return axis


def _write(op: str, data: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    axis = _check(op, data, indices, updates, axis)
    rows, length = indices.shape[0], updates.shape[axis]
    if updates.shape[0] != rows:
        updates = updates.narrow(0, 0, rows)
    if is_readable(indices):
        starts = indices.tolist()
        limit = data.shape[axis] - length
        for row, start in enumerate(starts):
            if not 0 <= start <= limit:
                raise IndexError(
                    f"npu::{op}: indices[{row}] is {start}, and {length} entries from there leave axis {axis} of the "
                    f"input, which has {data.shape[axis]}; allocate a longer cache or write less"
                )
        if starts and is_readable(data) and starts.count(starts[0]) == rows:
            # All rows start together: one strided copy.
            data.narrow(0, 0, rows).narrow(axis, starts[0], length).copy_(updates)
            return data
    row_index = torch.arange(rows, device=data.device)
    start_index = indices.to(device=data.device, dtype=torch.int64)
    where: list[Tensor | None]
    if length == 1:
        # A single entry per row is indexed without its axis, which keeps the index small.
        where = [row_index, *[None] * (axis - 1), start_index]
        updates = updates.squeeze(axis)
    else:
        span = torch.arange(length, device=data.device)
        where = [row_index[:, None], *[None] * (axis - 1), start_index[:, None] + span]
        # Index tensors with whole dimensions between them put their own dimensions first.
        updates = updates.movedim(axis, 1)
    return torch.ops.aten.index_put_(data, where, updates)
