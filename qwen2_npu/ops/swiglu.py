"""npu_swiglu: silu of the first half times the second half."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, invalid


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(a) · b for [a; b] = input split in half along `dim`; fp32 inside, one rounding.

    Args:
        input: any shape whose size along `dim` is even; float32, bfloat16 or float16.

    Returns:
        Like `input` with `dim` halved.

    Raises:
        ValueError: dtype, `dim` or an odd size.
    """
    check_float("npu_swiglu", "input", input)
    if not -input.dim() <= dim < input.dim():
        raise invalid("npu_swiglu", "dim", dim, f"a dimension of the input, whose shape is {tuple(input.shape)}")
    if input.shape[dim] % 2:
        raise invalid("npu_swiglu", "input", input, f"an even size along dim {dim}")
    gate, up = input.chunk(2, dim)
    # In place on what was just made: a large tensor less to allocate.
    if input.dtype == torch.float32:
        return torch.nn.functional.silu(gate).mul_(up)
    return torch.nn.functional.silu(gate.float(), inplace=True).mul_(up).to(input.dtype)
