"""npu_grouped_matmul: groups of rows, each times the weight of its group: the experts of a mixture.

The work follows the rows: a group without rows costs nothing and its weight is not read. How many rows each group has
is data. On an NPU the kernel reads it there; here the host does, in an operator of its own that a traced graph holds as
one node. Products accumulate in float32 and are rounded once, bias included.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid, reject_unsupported
from qwen2_npu.ops.linear import linear

OP = "npu_grouped_matmul"

MAX_GROUPS = 1024
"""Of one 3-D weight; lists have 128 tensors at most (CANN's documentation)."""
MAX_TENSORS = 128
INNER_LIMIT = 65536
"""The last dimension of every x and weight is smaller, on Atlas A2."""


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    **unsupported: Any,
) -> list[Tensor]:
    """``y_i = x_i @ weight_i + bias_i`` for every group i. Inference only.

    Args:
        x: [(M, K)], whose rows `group_list` divides; or one tensor (..., K) per group, without a `group_list`; (M, K)
            where there is one result for all. float32, bfloat16 or float16.
        weight: [(groups, K, N)], or one (K, N) per group; contiguous or transposed; the dtype of `x`.
        bias: [(groups, N)], or one (N,) per group. float32 where `x` is bfloat16, else the dtype of `x`.
        group_list: int64 (groups,), or integers: where each group ends (`group_list_type` 0) or how many rows it has
            (1). Together they are all rows of `x`.
        split_item: 0 or 1: one result per group; 2 or 3: one for all.
        group_type: 0 with a tensor `group_list`: rows are divided. -1 without one.
        tuning_config: how many rows a group is expected to have; changes no result.
        unsupported: quantisation, and the activation that goes with it; only the defaults.

    Returns:
        A list of one (M, N), or of one tensor per group, in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype, number or argument that is not supported.
    """
    reject_unsupported(OP, unsupported)
    kind, whole = group_list_type or 0, (split_item or 0) > 1
    _check_numbers(split_item, group_type, kind, group_list)
    groups = _check_tensors(x, weight, bias, whole)
    if group_list is None or len(x) > 1:
        _check_one_x_per_group(x, groups, group_type, group_list)
        weights, biases = _per_group(weight, 3), [None] * groups if not bias else _per_group(bias, 2)
        results = [product(*operands) for operands in zip(x, weights, biases, strict=True)]
        return [torch.cat(results)] if whole else results
    numbers = _as_tensor(group_list, x[0].device)
    _check_group_list(numbers, x[0], groups, group_list if isinstance(group_list, Tensor) else list(group_list))
    y = IN_GRAPHS(x[0], list(weight), list(bias or []), numbers, kind)
    return [y] if whole else list(y.split(_sizes(numbers, kind, x[0])))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One group's product, rounded once."""
    if bias is not None:
        return (x.float() @ weight.float() + bias.float()).to(x.dtype)
    return linear(x, weight.mT) if weight.mT.is_contiguous() else x @ weight


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a weight (groups, K, N), as ``device`` multiplies it fastest; docs/performance.md has the measurement.

    On a CPU oneDNN reads bfloat16 a quarter faster where K lies densely, and one row takes the way of ``linear``.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return torch.empty(shape[0], shape[2], shape[1], dtype=dtype, device=device).mT
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def products(x: Tensor, weight: list[Tensor], bias: list[Tensor], group_list: Tensor, kind: int) -> Tensor:
    """One product per group that has rows, each into its place; directly, where PyTorch's own product serves."""
    directly = not bias and not torch.is_grad_enabled()  # no derivative can follow a product with out=
    y = x.new_empty(x.shape[0], weight[0].shape[-1])
    ends = accumulate(_sizes(group_list, kind, x))
    for group, (start, end) in enumerate(pairwise([0, *ends])):
        if start == end:
            continue
        rows, own = x[start:end], _of_group(weight, group, 3)
        if directly and own.is_contiguous():
            torch.mm(rows, own, out=y[start:end])
        else:
            y[start:end] = product(rows, own, _of_group(bias, group, 2) if bias else None)
    return y


def _sizes(group_list: Tensor, kind: int, x: Tensor) -> list[int]:
    """Rows of each group.

    Raises:
        ValueError: they are negative, or together not the rows of ``x``.
    """
    numbers = group_list.tolist()
    sizes = numbers if kind == 1 else [end - start for start, end in pairwise([0, *numbers])]
    if min(sizes) < 0 or sum(sizes) != x.shape[0]:
        form = "sizes (group_list_type=1)" if kind == 1 else "ends (group_list_type=0), which never decrease,"
        raise invalid(OP, "group_list", numbers, f"{form} of groups that are together the {x.shape[0]} rows of x")
    return sizes


def _of_group(tensors: Sequence[Tensor], group: int, stacked: int) -> Tensor:
    """The tensor of one group, of a list or of one tensor of ``stacked`` dimensions."""
    return tensors[0][group] if _is_stacked(tensors, stacked) else tensors[group]


def _per_group(tensors: Sequence[Tensor], stacked: int) -> list[Tensor]:
    return list(tensors[0].unbind()) if _is_stacked(tensors, stacked) else list(tensors)


def _is_stacked(tensors: Sequence[Tensor], dimensions: int) -> bool:
    return len(tensors) == 1 and tensors[0].dim() == dimensions


def _as_tensor(group_list: Tensor | Sequence[int], device: torch.device) -> Tensor:
    if isinstance(group_list, Tensor):
        return group_list
    return torch.tensor(list(group_list), dtype=torch.int64, device=device)


# ---- checks ---------------------------------------------------------------------------------------------------------
def _check_numbers(split_item: int | None, group_type: int | None, kind: int, group_list: object) -> None:
    if split_item not in (None, 0, 1, 2, 3):
        raise invalid(OP, "split_item", split_item, "0 or 1 (one result per group), 2 or 3 (one for all)")
    if kind not in (0, 1):
        raise invalid(OP, "group_list_type", kind, "0 (where the groups end) or 1 (their sizes)")
    wanted = (0,) if isinstance(group_list, Tensor) else (-1, 0) if group_list is None else (None, 0)
    if group_type not in wanted:
        raise invalid(OP, "group_type", group_type, "0 (a tensor group_list divides the rows) or -1 (without one)")


def _check_tensors(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor] | None, whole: bool) -> int:
    """How many groups there are."""
    for name, tensors in (("x", x), ("weight", weight)):
        if not 0 < len(tensors) <= MAX_TENSORS:
            raise invalid(OP, name, list(tensors), f"a list of 1 to {MAX_TENSORS} tensors")
        for tensor in tensors:
            check_float(OP, name, tensor)
            check_same_dtype(OP, x[0], **{name: tensor})
            if tensor.dim() < 2 or tensor.shape[-1] >= INNER_LIMIT:
                raise invalid(OP, name, tensor, f"two or more dimensions, the last below {INNER_LIMIT}")
    groups = weight[0].shape[0] if _is_stacked(weight, 3) else len(weight)
    if not 0 < groups <= MAX_GROUPS:
        raise invalid(OP, "weight", weight[0], f"weights of 1 to {MAX_GROUPS} groups")
    if _is_stacked(weight, 3):
        inner = [weight[0].shape[1]] * len(x)
    else:
        inner = [tensor.shape[0] for tensor in weight]
        if any(tensor.dim() != 2 for tensor in weight):
            raise invalid(OP, "weight", list(weight), "one (groups, K, N), or one (K, N) per group")
    own = list(x) * len(inner) if len(x) == 1 else list(x)
    if any(tensor.shape[-1] != size for tensor, size in zip(own, inner, strict=False)):
        raise invalid(OP, "x", list(x), f"(..., K) with K = {inner}, as the weights have it")
    if whole and any(tensor.dim() != 2 for tensor in x):
        raise invalid(OP, "x", list(x), "(M, K) where the result is one tensor")
    if (whole or len(x) == 1) and any(tensor.shape[-1] != weight[0].shape[-1] for tensor in weight):
        raise invalid(OP, "weight", list(weight), "weights with the same N, whose products are one tensor")
    if bias:
        _check_bias(x[0], weight, bias, groups)
    return groups


def _check_bias(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], groups: int) -> None:
    dtype = torch.float16 if x.dtype == torch.float16 else torch.float32
    columns = [tensor.shape[-1] for tensor in weight]
    shapes = [(groups, columns[0])] if _is_stacked(weight, 3) else [(count,) for count in columns]
    if [tuple(tensor.shape) for tensor in bias] != shapes or any(tensor.dtype != dtype for tensor in bias):
        raise invalid(OP, "bias", list(bias), f"{dtype} tensors of shapes {shapes}")


def _check_one_x_per_group(x: Sequence[Tensor], groups: int, group_type: int | None, group_list: object) -> None:
    if group_list is not None:
        raise invalid(OP, "group_list", group_list, "None where every group has an x of its own")
    if len(x) != groups or (group_type == 0 and len(x) == 1):
        wanted = f"one tensor for each of the {groups} weights, or one tensor and a group_list that divides its rows"
        raise invalid(OP, "group_list" if len(x) == 1 else "x", None if len(x) == 1 else list(x), wanted)


def _check_group_list(numbers: Tensor, x: Tensor, groups: int, given: object) -> None:
    if numbers.dtype != torch.int64 or tuple(numbers.shape) != (groups,):
        raise invalid(OP, "group_list", given, f"an int64 tensor of shape ({groups},): one number per weight")
    if x.dim() != 2:
        raise invalid(OP, "x", x, "(M, K) where a group_list divides the rows")


# A kernel that reads its group list cannot be traced: graphs hold this operator, which tells its shape without reading.
_library = torch.library.Library("qwen2_npu", "FRAGMENT")
_library.define("grouped_matmul(Tensor x, Tensor[] weight, Tensor[] bias, Tensor group_list, int kind) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("grouped_matmul", products, _key)
_library.impl("grouped_matmul", lambda x, weight, *_: x.new_empty(x.shape[0], weight[0].shape[-1]), "Meta")
IN_GRAPHS = torch.ops.qwen2_npu.grouped_matmul.default
"""One x, divided by a group list, as one operator."""
