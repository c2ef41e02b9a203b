"""GE operators that rearrange elements and compute nothing."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator
from qwen2_npu.emulator.ge.proto import attribute_dtype

operator("Identity", views="x")(lambda x: x)


@operator("Reshape", views="x", fixed={"axis": 0, "num_axes": -1})
def reshape(x: Tensor, shape: Ints) -> Tensor:
    return x.reshape(shape)


@operator("Transpose", views="x")
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


@operator("Unsqueeze", views="x")
def unsqueeze(x: Tensor, *, axes: tuple[int, ...] = ()) -> Tensor:
    # GE's axes are those of the result.
    for axis in sorted(axis if axis >= 0 else axis + x.dim() + len(axes) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", views="x")
def squeeze(x: Tensor, *, axis: tuple[int, ...] = ()) -> Tensor:
    return x.squeeze(tuple(axis)) if axis else x.squeeze()


@operator("ExpandDims", views="x")
def expand_dims(x: Tensor, axis: Ints) -> Tensor:
    return x.unsqueeze(axis[0])


@operator("BroadcastTo", "Expand", views="x")
def broadcast_to(x: Tensor, shape: Ints) -> Tensor:
    given = [1] * (len(shape) - x.dim()) + list(x.shape)
    return x.expand([have if size in (-1, 1) else size for size, have in zip(shape, given, strict=True)])


@operator("SplitV", views="x")
def split_v(x: Tensor, size_splits: Ints, split_dim: Ints, *, num_split: int) -> tuple[Tensor, ...]:
    dim = split_dim[0]
    rest = x.shape[dim] - sum(size for size in size_splits if size != -1)  # -1: what the others leave
    return torch.split(x, [rest if size == -1 else size for size in size_splits], dim)


@operator("Split", views="x")
def split(split_dim: Ints, x: Tensor, *, num_split: int) -> tuple[Tensor, ...]:
    return torch.tensor_split(x, num_split, split_dim[0])


@operator("SplitD", views="x")
def split_d(x: Tensor, *, split_dim: int, num_split: int) -> tuple[Tensor, ...]:
    return torch.tensor_split(x, num_split, split_dim)


@operator("Unpack", views="x")
def unpack(x: Tensor, *, num: int, axis: int = 0) -> tuple[Tensor, ...]:
    return torch.unbind(x, axis)


@operator(
    "StridedSliceV2",
    views="x",
    fixed={"begin_mask": 0, "end_mask": 0, "ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 0},
)
def strided_slice(x: Tensor, begin: Ints, end: Ints, axes: Ints | None, strides: Ints | None) -> Tensor:
    index = [slice(None)] * x.dim()
    dims = range(len(begin)) if axes is None else axes
    for dim, start, stop, step in zip(dims, begin, end, strides or [1] * len(begin), strict=True):
        index[dim] = slice(start, stop, step)
    return x[tuple(index)]


@operator("Slice", views="x")
def slice_(x: Tensor, offsets: Ints, size: Ints) -> Tensor:
    return x[tuple(slice(o, None if n == -1 else o + n) for o, n in zip(offsets, size, strict=True))]


@operator("AsStrided")
def as_strided(x: Tensor, size: Ints, stride: Ints, storage_offset: Ints) -> Tensor:
    # GE's tensors are dense, so strides count in the elements of x in order.
    return x.contiguous().reshape(-1).as_strided(size, stride, storage_offset[0]).clone()


@operator("ConcatV2")
def concat_v2(x: list[Tensor], concat_dim: Ints, *, N: int = 1) -> Tensor:  # noqa: N803
    # Scalars count as vectors of one.
    return torch.cat([part.reshape(1) if part.dim() == 0 else part for part in x], concat_dim[0])


@operator("ConcatD")
def concat_d(x: list[Tensor], *, concat_dim: int, N: int = 1) -> Tensor:  # noqa: N803
    return torch.cat(x, concat_dim)


@operator("Pack")
def pack(x: list[Tensor], *, axis: int = 0, N: int) -> Tensor:  # noqa: N803
    return torch.stack(x, axis)


@operator("Tile")
def tile(x: Tensor, multiples: Ints) -> Tensor:
    return x.repeat(multiples)


@operator("ReverseV2")
def reverse(x: Tensor, axis: Ints) -> Tensor:
    return torch.flip(x, axis)


@operator("Tril")
def tril(x: Tensor, *, diagonal: int = 0) -> Tensor:
    return torch.tril(x, diagonal)


@operator("Triu")
def triu(x: Tensor, *, diagonal: int = 0) -> Tensor:
    return torch.triu(x, diagonal)


@operator("Shape")
def shape(x: Tensor, *, dtype: int = 3) -> Tensor:
    return torch.tensor(list(x.shape), dtype=attribute_dtype(dtype))


@operator("Bitcast", views="x", fixed={"keep_dim": False})
def bitcast(x: Tensor, *, type: int) -> Tensor:
    return x.view(attribute_dtype(type))
