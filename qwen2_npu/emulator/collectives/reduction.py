"""What HCCL reduces on this card, and the precision it is emulated in.

Rounding: partial results of float16 and bfloat16 are kept in float32 and rounded to the dtype once, at the end; float32
and integers are reduced in their own dtype (integers wrap). The order of the operands is gloo's: the same in every run
of a given number of ranks and elements, and the same result on all ranks. HCCL adds in the tensors' own dtype and in
an order that depends on its algorithm, so a sum over more than two ranks can differ from it in the last bits.
"""

from __future__ import annotations

import torch
from torch.distributed import ReduceOp

from qwen2_npu.emulator.collectives.errors import CollectiveError, HcclResult

OPERATIONS: dict[str, ReduceOp.RedOpType] = {
    "sum": ReduceOp.SUM,
    "prod": ReduceOp.PRODUCT,
    "max": ReduceOp.MAX,
    "min": ReduceOp.MIN,
}
"""HCCL's name, in the order of HcclReduceOp -> gloo's operation."""

COMPUTED_IN: dict[torch.dtype, torch.dtype] = {
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
}
"""Dtype that HCCL reduces on Atlas A2 -> dtype of the partial results here."""

NO_PRODUCT = (torch.int16, torch.bfloat16)
"""Dtypes that HCCL's prod does not take on Atlas A2."""


def check(dtype: torch.dtype, operation: str) -> None:
    """Raise CollectiveError for what HCCL refuses on Atlas A2."""
    if operation not in OPERATIONS:
        raise CollectiveError(
            HcclResult.PARA, f"reduction {operation!r} is not one of HCCL's: {', '.join(OPERATIONS)} are"
        )
    refused = dtype not in COMPUTED_IN or (operation == "prod" and dtype in NO_PRODUCT)
    if refused:
        names = [str(d).removeprefix("torch.") for d in COMPUTED_IN if operation != "prod" or d not in NO_PRODUCT]
        raise CollectiveError(
            HcclResult.NOT_SUPPORT,
            f"HCCL's {operation} of {dtype} does not exist on Atlas A2, which takes {', '.join(names)}",
        )


def identity(like: torch.Tensor, operation: str) -> torch.Tensor:
    """Operands that change no result: what a rank contributes that is left out."""
    limits = torch.finfo(like.dtype) if like.dtype.is_floating_point else torch.iinfo(like.dtype)
    value = {"sum": 0, "prod": 1, "max": limits.min, "min": limits.max}[operation]
    return torch.full_like(like, value)
