"""torch_npu's operators that hold a collective, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.emulator.collectives import library

Tensor = torch.Tensor


def mm_all_reduce(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    comm_turn: int = 0,
    **others: Any,
) -> Tensor:
    """``all_reduce(x1 @ x2 + bias) + x3``: the bias of every rank is part of the sum.

    The product with its bias is rounded once to the dtype of ``x1``, as is each following step.

    Args:
        x1: (M, K) or (B, M, K), float16 or bfloat16.
        x2: (K, N), same dtype. bias: (N,). x3: as the result.
        hcom: name of the communicator.

    Raises:
        NotImplementedError: quantised operands.
        RuntimeError: shapes, dtypes or reduction the operator refuses.
    """
    given = [name for name, value in others.items() if value not in (None, 0)]
    if given:
        raise NotImplementedError(f"npu_mm_all_reduce_base with {given[0]} is not supported on the emulated NPU")
    if reduce_op != "sum":
        raise RuntimeError(f"npu_mm_all_reduce_base: reduce_op={reduce_op!r}; only 'sum' is supported")
    product = _product("npu_mm_all_reduce_base", x1, x2, bias)
    total = library.find(hcom).all_reduce(product.reshape(-1)).view_as(product)
    return total if x3 is None else total + x3


def _product(name: str, x1: Tensor, x2: Tensor, bias: Tensor | None) -> Tensor:
    if x1.dtype not in (torch.float16, torch.bfloat16) or x2.dtype != x1.dtype:
        raise RuntimeError(f"{name}: x1 {x1.dtype} and x2 {x2.dtype} must both be float16 or both bfloat16")
    if x1.dim() not in (2, 3) or x2.dim() != 2 or x1.shape[-1] != x2.shape[0]:
        raise RuntimeError(f"{name}: x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} must be (…, M, K) and (K, N)")
    product = x1.float() @ x2.float()
    if bias is not None:
        product += bias.float()
    return product.to(x1.dtype)


TABLE: dict[str, Callable[..., Any]] = {"npu_mm_all_reduce_base": mm_all_reduce}
"""Operator name -> function of CPU tensors."""
