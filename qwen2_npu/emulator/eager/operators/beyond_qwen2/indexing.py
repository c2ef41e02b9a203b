"""Gather, scatter, reductions with indices, sorting, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen2_npu.emulator.eager.gradients import gradient

Tensor = torch.Tensor


def gather_backward(grad: Tensor, size: Sequence[int], dim: int, index: Tensor, sparse_grad: bool) -> Tensor:
    return grad.new_zeros(size).scatter_add_(dim, index, grad)


def gather_sparse_index(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x``: ``x[index]``."""
    return x[index]


def gather_sparse_index_backward(grad: Tensor, size: Sequence[int], index: Tensor) -> Tensor:
    return grad.new_zeros(size).index_put_((index,), grad, accumulate=True)


def reduce_with_index(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """torch's max or min along a dimension, with int32 indices."""

    def reduce(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        values, indices = getattr(torch, name)(x, dim, keepdim)
        return values, indices.int()

    return reduce


def reduce_backward(grad: Tensor, dim: int, indices: Tensor, sizes: Sequence[int], keepdim: bool) -> Tensor:
    if not keepdim and sizes:
        grad, indices = grad.unsqueeze(dim), indices.unsqueeze(dim)
    return grad.new_zeros(sizes).scatter_(dim, indices.long(), grad)


def repeat_interleave_backward(grad: Tensor, x: Tensor, repeats: Any, dim: int | None = None) -> Tensor:
    return gradient(lambda value: value.repeat_interleave(repeats, dim), x, grad)


def index_add(x: Tensor, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """Along the first dimension."""
    return x.index_add(0, index, source, alpha=alpha)


def scatter(x: Tensor, indices: Tensor, updates: Tensor, dim: int) -> Tensor:
    """``x`` with one element per row along ``dim`` replaced: ``out[i, indices[i]] = updates[i]``."""
    if indices.numel() == 0:
        return x.clone()
    return x.scatter(dim, indices.long().unsqueeze(dim), updates.unsqueeze(dim))


def scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """``x[indices[..., 0], indices[..., 1], …] = updates``."""
    return x.index_put_(tuple(indices.long().unbind(-1)), updates)


def one_hot(x: Tensor, num_classes: int = -1, depth: int = 1, on_value: float = 1, off_value: float = 0) -> Tensor:
    """float32, a last dimension of ``depth``: ``on_value`` where it equals ``x``."""
    hit = x.unsqueeze(-1) == torch.arange(depth)
    return torch.where(hit, float(on_value), float(off_value))


def masked_fill_range(x: Tensor, start: Tensor, end: Tensor, value: Tensor, axis: int = -1) -> Tensor:
    """``x`` with ``value[i]`` at positions ``start[i] … end[i] − 1`` along ``axis``, for every i."""
    out = x.clone()
    for first, last, filling in zip(start.tolist(), end.tolist(), value.unbind(), strict=True):
        out.narrow(axis, first, last - first).fill_(filling.item())
    return out


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return x.sort(dim, descending).values


TABLE: dict[str, Callable[..., Any]] = {
    "npu_gather_backward": gather_backward,
    "npu_gather_sparse_index": gather_sparse_index,
    "npu_gather_sparse_index_backward": gather_sparse_index_backward,
    "npu_max.dim": reduce_with_index("max"),
    "npu_min.dim": reduce_with_index("min"),
    "npu_max_backward": reduce_backward,
    "npu_min_backward": reduce_backward,
    "repeat_interleave_backward_int": repeat_interleave_backward,
    "repeat_interleave_backward_tensor": repeat_interleave_backward,
    "_npu_index_add": index_add,
    "_npu_index_add_": lambda x, index, source, *, alpha=1: x.index_add_(0, index, source, alpha=alpha),
    "npu_scatter": scatter,
    "npu_scatter_nd_update": lambda x, indices, updates: scatter_nd_update_(x.clone(), indices, updates),
    "npu_scatter_nd_update_": scatter_nd_update_,
    "npu_one_hot": one_hot,
    "npu_masked_fill_range": masked_fill_range,
    "npu_sort_v2": _sort,
    "npu_sort_v2.out": lambda x, dim=-1, descending=False, *, out: out.copy_(_sort(x, dim, descending)),
}
