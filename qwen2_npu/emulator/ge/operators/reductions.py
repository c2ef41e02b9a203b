"""GE operators that reduce, search or sort along dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator
from qwen2_npu.emulator.ge.proto import attribute_dtype


def _dims(axes: Ints | list[int], x: Tensor) -> list[int]:
    """No axes mean all of them."""
    return list(axes) or list(range(x.dim()))


def _over_dims(function: Callable[..., Tensor]) -> Callable[[Tensor, Ints, bool], Tensor]:
    return lambda x, axes, keep: function(x, _dims(axes, x), keepdim=keep)


def _one_by_one(function: Callable[..., Tensor]) -> Callable[[Tensor, Ints, bool], Tensor]:
    """For functions of one dimension."""

    def reduce(x: Tensor, axes: Ints, keep: bool) -> Tensor:
        dims = sorted((dim % max(x.dim(), 1) for dim in _dims(axes, x)), reverse=True)
        for dim in dims:
            x = function(x, dim, keepdim=keep)
        return x

    return reduce


REDUCTIONS: dict[str, Callable[[Tensor, Ints, bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(_dims(axes, x), keepdim=keep, dtype=x.dtype),
    "ReduceMax": _over_dims(torch.amax),
    "ReduceMin": _over_dims(torch.amin),
    "ReduceAll": _over_dims(torch.all),
    "ReduceAny": _over_dims(torch.any),
    "ReduceLogSumExp": _over_dims(torch.logsumexp),
    "ReduceProd": _one_by_one(torch.prod),
}
"""Operators of inputs x and axes."""


def _enter(name: str, function: Callable[[Tensor, Ints, bool], Tensor]) -> None:
    @operator(name)
    def reduce(x: Tensor, axes: Ints, *, keep_dims: bool = False) -> Tensor:
        return function(x, axes, keep_dims)


for _name, _reduction in REDUCTIONS.items():
    _enter(_name, _reduction)


@operator("ReduceMean")
def reduce_mean(x: Tensor, axes: Ints, *, keep_dims: bool = False, noop_with_empty_axes: bool = True) -> Tensor:
    # torchair leaves the flag at its default where it means all dimensions.
    return x.mean(_dims(axes, x), keepdim=keep_dims)


@operator("ReduceStdWithMean", fixed={"invert": False, "epsilon": 0.001, "unbiased": True})
def reduce_std_with_mean(
    x: Tensor, mean: Tensor, *, dim: tuple[int, ...] = (), keepdim: bool = False, correction: int = 1
) -> Tensor:
    dims = _dims(dim, x)
    count = 1
    for axis in dims:
        count *= x.shape[axis]
    return torch.sqrt(torch.square(x - mean).sum(dims, keepdim=keepdim) / max(count - correction, 0))


INFINITE = {float(2**31): float("inf"), float(-(2**31)): float("-inf")}
"""How infinite norms are written, as the graph's 32-bit floats hold them."""


@operator("LpNormV2", fixed={"epsilon": 0.0})
def lp_norm(x: Tensor, *, p: float = 2.0, axes: tuple[int, ...] = (), keepdim: bool = False) -> Tensor:
    order = INFINITE.get(p, p)
    return torch.linalg.vector_norm(x, order, _dims(axes, x), keepdim)


@operator("ArgMaxV2")
def argmax(x: Tensor, dimension: Ints, *, dtype: int = 9) -> Tensor:
    return torch.argmax(x, dimension[0]).to(attribute_dtype(dtype))


@operator("ArgMin")
def argmin(x: Tensor, dimension: Ints, *, dtype: int = 9) -> Tensor:
    return torch.argmin(x, dimension[0]).to(attribute_dtype(dtype))


@operator("ArgMaxWithValue")
def argmax_with_value(x: Tensor, *, dimension: int, keep_dims: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.max(x, dimension, keepdim=keep_dims)
    return indices.to(torch.int32), values


@operator("ArgMinWithValue")
def argmin_with_value(x: Tensor, *, dimension: int, keep_dims: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.min(x, dimension, keepdim=keep_dims)
    return indices.to(torch.int32), values


@operator("Sort")
def sort(x: Tensor, *, axis: int = -1, descending: bool = False, stable: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=axis, descending=descending, stable=stable)
    return values, indices.to(torch.int32)


@operator("TopKV2", fixed={"sort_policy": 1})
def topk(x: Tensor, k: Ints, *, sorted: bool = True, dim: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, k[0], dim, largest, sorted)
    return values, indices.to(torch.int32)


@operator("Cumsum", fixed={"exclusive": False, "reverse": False})
def cumsum(x: Tensor, axis: Ints) -> Tensor:
    return torch.cumsum(x, axis[0], dtype=x.dtype)


@operator("SearchSorted")
def search_sorted(
    sorted_sequence: Tensor, values: Tensor, sorter: Tensor | None, *, dtype: int = 9, right: bool = False
) -> Tensor:
    return torch.searchsorted(sorted_sequence, values, right=right, sorter=sorter).to(attribute_dtype(dtype))
