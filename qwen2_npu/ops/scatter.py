"""Cache writes: scatter_update_ (in place) and scatter_update (a copy)."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2_npu.ops.checks import INDEX_DTYPES, check_same_dtype, invalid, is_readable


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
    _check("scatter_update", input, indices, updates, axis)
    return _write("scatter_update", input.clone(), indices, updates, axis)


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
