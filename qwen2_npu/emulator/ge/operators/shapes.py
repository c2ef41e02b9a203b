"""GE operators that only rearrange: nothing is computed."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.ge.operators.table import Tensor, operator

operator("Identity")(lambda x: x)


@operator("Reshape")
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape(shape.tolist())


@operator("Transpose")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(perm.tolist())


@operator("Unsqueeze")
def unsqueeze(x: Tensor, *, axes: list[int]) -> Tensor:
    # GE's axes are those of the result.
    for axis in sorted(axis if axis >= 0 else axis + x.dim() + len(axes) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def squeeze(x: Tensor, *, axis: list[int] | tuple[int, ...] = ()) -> Tensor:
    return x.squeeze(tuple(axis)) if axis else x.squeeze()


@operator("ExpandDims")
def expand_dims(x: Tensor, axis: Tensor) -> Tensor:
    return x.unsqueeze(int(axis))


@operator("BroadcastTo", "Expand")
def broadcast_to(x: Tensor, shape: Tensor) -> Tensor:
    missing = shape.numel() - x.dim()
    given = [1] * missing + list(x.shape)
    return x.expand([have if size in (-1, 1) else size for size, have in zip(shape.tolist(), given, strict=True)])


@operator("SplitV")
def split_v(x: Tensor, size_splits: Tensor, split_dim: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, size_splits.tolist(), int(split_dim))


@operator("Split")
def split(split_dim: Tensor, x: Tensor, *, num_split: int) -> tuple[Tensor, ...]:
    return torch.tensor_split(x, num_split, int(split_dim))


@operator("SplitD")
def split_d(x: Tensor, *, split_dim: int, num_split: int) -> tuple[Tensor, ...]:
    return torch.tensor_split(x, num_split, split_dim)


@operator("StridedSliceV2")
def strided_slice(
    x: Tensor, begin: Tensor, end: Tensor, axes: Tensor | None = None, strides: Tensor | None = None
) -> Tensor:
    starts, stops = begin.tolist(), end.tolist()
    dims = axes.tolist() if axes is not None else list(range(len(starts)))
    steps = strides.tolist() if strides is not None else [1] * len(starts)
    index = [slice(None)] * x.dim()
    for dim, start, stop, step in zip(dims, starts, stops, steps, strict=True):
        index[dim] = slice(start, stop, step)
    return x[tuple(index)]


@operator("Slice")
def slice_(x: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    ends = [
        x.shape[d] if n == -1 else o + n for d, (o, n) in enumerate(zip(offsets.tolist(), size.tolist(), strict=True))
    ]
    return x[tuple(slice(o, e) for o, e in zip(offsets.tolist(), ends, strict=True))]


@operator("ConcatV2", variadic=True)
def concat_v2(inputs: list[Tensor], *, N: int | None = None) -> Tensor:  # noqa: N803
    return torch.cat(inputs[:-1], int(inputs[-1]))


@operator("ConcatD", variadic=True)
def concat_d(inputs: list[Tensor], *, concat_dim: int, N: int | None = None) -> Tensor:  # noqa: N803
    return torch.cat(inputs, concat_dim)


@operator("Pack", variadic=True)
def pack(inputs: list[Tensor], *, axis: int = 0, N: int | None = None) -> Tensor:  # noqa: N803
    return torch.stack(inputs, axis)


@operator("Shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape), dtype=torch.int64)
