"""Casts, formats, copies and other operators that move data.

Private formats (NZ, 5HD, …) are a matter of layout alone: every tensor here has format ND, and a cast copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def cast(x: Tensor, dtype: torch.dtype, *_: Any, **__: Any) -> Tensor:
    return x.to(dtype, copy=True)


NUMBERS = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    9: torch.complex64,
    10: torch.complex128,
    11: torch.bool,
    15: torch.bfloat16,
}
"""PyTorch's own numbers of dtypes; larger ones are torch_npu's, of formats that the CPU lacks."""


def cast_by_number(x: Tensor, number: int, input_dtype: int | None = None) -> Tensor:
    if number not in NUMBERS or input_dtype is not None:
        raise NotImplementedError(f"npu_dtype_cast: dtype={number}, input_dtype={input_dtype} is not emulated")
    return x.to(NUMBERS[number], copy=True)


def confusion_transpose(x: Tensor, perm: Sequence[int], shape: Sequence[int], transpose_first: bool) -> Tensor:
    """A permutation and a reshape, in either order."""
    moved = x.permute(*perm).reshape(shape) if transpose_first else x.reshape(shape).permute(*perm)
    return moved.contiguous()


def confusion_transpose_backward(
    grad: Tensor, perm: Sequence[int], shape: Sequence[int], transpose_first: bool
) -> Tensor:
    """``shape`` is the forward input's; ``transpose_first`` says the order of this operator, not of the forward's."""
    inverse = [list(perm).index(axis) for axis in range(len(perm))]
    if transpose_first:  # the forward reshaped, then permuted
        return grad.permute(inverse).reshape(shape).contiguous()
    return grad.reshape([shape[axis] for axis in perm]).permute(inverse).contiguous()


def narrow(x: Tensor, offsets: Sequence[int], size: Sequence[int]) -> Tensor:
    """``x[offset : offset + size]`` in every dimension; a size of -1 means the rest."""
    for axis, (start, length) in enumerate(zip(offsets, size, strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x.contiguous()


def pad(x: Tensor, paddings: Sequence[int]) -> Tensor:
    """Zeros around ``x``: (before, after) per dimension, first dimension first."""
    pairs = [tuple(paddings[index : index + 2]) for index in range(0, len(paddings), 2)]
    return F.pad(x, [side for pair in reversed(pairs) for side in pair])


def strided_slice(
    x: Tensor,
    begin: Sequence[int],
    end: Sequence[int],
    strides: Sequence[int],
    begin_mask: int = 0,
    end_mask: int = 0,
    ellipsis_mask: int = 0,
    new_axis_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Tensor:
    """Python slicing given as numbers; a bit of ``begin_mask`` or ``end_mask`` leaves that bound out."""
    if ellipsis_mask or new_axis_mask or shrink_axis_mask:
        raise NotImplementedError("npu_indexing: only begin_mask and end_mask are emulated")
    if any(stride < 0 for stride in strides):
        raise NotImplementedError("npu_indexing: negative strides are not emulated")
    slices = tuple(
        slice(None if begin_mask >> axis & 1 else first, None if end_mask >> axis & 1 else last, stride)
        for axis, (first, last, stride) in enumerate(zip(begin, end, strides, strict=True))
    )
    return x[slices].contiguous()


def out_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The ``out=`` variant of ``function``."""

    def write(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        return out.resize_(result.size()).copy_(result)

    return write


def _reshape(x: Tensor, shape: Sequence[int], can_refresh: bool = False) -> Tensor:
    return x.reshape(shape).clone()


def _transpose(x: Tensor, perm: Sequence[int], require_contiguous: bool = True) -> Tensor:
    return x.permute(*perm).contiguous()


def _broadcast(x: Tensor, size: Sequence[int]) -> Tensor:
    return x.expand(size).contiguous()


def _stride_copy(x: Tensor, shape: Sequence[int], stride: Sequence[int], storage_offset: int) -> Tensor:
    return x.as_strided(shape, stride, int(storage_offset)).clone(memory_format=torch.contiguous_format)


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.clone()


def _overwrite(x: Tensor, source: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.copy_(source)


_BOTH: dict[str, Callable[..., Tensor]] = {
    "npu_slice": narrow,
    "npu_indexing": strided_slice,
    "npu_reshape": _reshape,
    "npu_transpose": _transpose,
    "npu_broadcast": _broadcast,
    "npu_stride_copy": _stride_copy,
}

TABLE: dict[str, Callable[..., Any]] = {
    "_npu_dtype_cast": cast,
    "npu_dtype_cast": cast_by_number,
    "_npu_dtype_cast_backward": cast,
    "npu_dtype_cast_backward": cast,
    "npu_dtype_cast_": _overwrite,
    "_npu_format_cast": _same,
    "_npu_format_cast.aclnn": _same,
    "_npu_format_cast.input_dtype": _same,
    "npu_format_cast": _same,
    "npu_format_cast.Tensor": _same,
    "npu_format_cast_": _overwrite,
    "npu_format_cast_.acl_format": lambda x, *_, **__: x,
    "copy_memory_": _overwrite,
    "npu_view_copy": _overwrite,
    "one_": lambda x: x.fill_(1),
    "npu_confusion_transpose": confusion_transpose,
    "npu_confusion_transpose_backward": confusion_transpose_backward,
    "npu_pad": pad,
    "npu_prefetch": lambda *_, **__: None,
    **_BOTH,
    **{f"{name}.out": out_of(function) for name, function in _BOTH.items()},
}
