"""torch_npu's operators that hold a matrix product and a collective, on CPU tensors.

A product with its bias is rounded once to the dtype of its operands, as is each step after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.emulator.collectives import library
from qwen2_npu.emulator.collectives.communicator import Communicator
from qwen2_npu.ops import mm_all_reduce as ops
from qwen2_npu.ops.checks import invalid

Tensor = torch.Tensor

NARROW = (torch.float16, torch.bfloat16)


def mm_all_reduce(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    **unsupported: Any,
) -> Tensor:
    """``all_reduce(x1 @ x2 + bias + x3)``, as ``ops/mm_all_reduce.py`` says, over the communicator ``hcom``.

    Raises:
        ValueError: what the operator refuses. CollectiveError: no such communicator, or a failure of the collective.
    """
    ops.check_arguments(x1, x2, reduce_op, bias, x3, unsupported)
    if x1.dtype not in NARROW:
        raise invalid(ops.OP, "x1", x1, "dtype bfloat16 or float16 on an NPU")
    given = ops.contribution(x1, x2, bias, x3)
    if given.is_meta:  # only the shape is asked for
        return given
    return library.find(hcom).all_reduce(given.view(-1)).view_as(given)


def all_gather_mm(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    bias: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """``all_gather(x1) @ x2 + bias`` and the gathered ``x1`` (empty without ``gather_output``).

    Args:
        x1: (M, K), float16 or bfloat16; x2: (K, N), same dtype. bias: (N,).

    Raises:
        NotImplementedError: quantised operands.
        RuntimeError: shapes, dtypes or a reduction that the operator refuses.
    """
    name = "npu_all_gather_base_mm"
    _refuse(name, "sum", {**others, "gather_index": gather_index})
    whole = _of_size(name, hcom, world_size).all_gather(x1.contiguous().view(-1)).view(-1, *x1.shape[1:])
    return _product(name, whole, x2, bias, (2,)), whole if gather_output else whole.new_empty(0)


def mm_reduce_scatter(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    comm_turn: int = 0,
    **others: Any,
) -> Tensor:
    """This rank's rows of ``x1 @ x2 + bias`` summed over the ranks; arguments as for ``all_gather_mm``."""
    name = "npu_mm_reduce_scatter_base"
    _refuse(name, reduce_op, others)
    product = _product(name, x1, x2, bias, (2,))
    return _of_size(name, hcom, world_size).reduce_scatter(product.view(-1)).view(-1, x2.shape[1])


def _refuse(name: str, reduce_op: str, others: dict[str, Any]) -> None:
    given = [key for key, value in others.items() if value is not None and not (isinstance(value, int) and value == 0)]
    if given:
        raise NotImplementedError(f"{name} with {given[0]} is not supported on the emulated NPU")
    if reduce_op != "sum":
        raise RuntimeError(f"{name}: reduce_op={reduce_op!r}; only 'sum' is supported")


def _of_size(name: str, hcom: str, world_size: int) -> Communicator:
    comm = library.find(hcom)
    if comm.size != world_size:
        raise RuntimeError(f"{name}: world_size={world_size}, and the communicator {hcom!r} has {comm.size} ranks")
    return comm


def _product(name: str, x1: Tensor, x2: Tensor, bias: Tensor | None, dimensions: tuple[int, ...]) -> Tensor:
    if x1.dtype not in NARROW or x2.dtype != x1.dtype:
        raise RuntimeError(f"{name}: x1 {x1.dtype} and x2 {x2.dtype} must both be float16 or both bfloat16")
    if x1.dim() not in dimensions or x2.dim() != 2 or x1.shape[-1] != x2.shape[0]:
        wanted = " or ".join(f"{count}-D" for count in dimensions)
        raise RuntimeError(
            f"{name}: x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} must be {wanted} and 2-D, and the last "
            "dimension of x1 must equal the first of x2"
        )
    product = x1.float() @ x2.float()
    if bias is not None:
        product += bias.float()
    return product.to(x1.dtype)


TABLE: dict[str, Callable[..., Any]] = {
    "npu_mm_all_reduce_base": mm_all_reduce,
    "npu_all_gather_base_mm": all_gather_mm,
    "npu_mm_reduce_scatter_base": mm_reduce_scatter,
}
"""Operator name -> function of CPU tensors."""
