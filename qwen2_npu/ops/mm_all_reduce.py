"""npu_mm_all_reduce_base: the product of a row-parallel layer, summed over the cards of a process group.

``all_reduce(x1 @ x2 + bias + x3)``: bias and x3 are added on every card before the sum, so n cards add what each of
them gives, n times the same tensor where all give the same. A layer that wants its bias or a residual once gives it on
one card only. That is the formula of CANN's MatmulAllReduce (aclnnMatmulAllReduceV2) and of op-plugin's documentation.

Roundings, as in CANN's kernel for Atlas A2: the product and its bias are summed in float32 and rounded once to the
dtype; x3 is added and the sum rounded; the cards' results are summed. HCCL sums in the dtype; here the sum over the
cards is taken in float32 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid, is_plain, reject_unsupported

if torch.distributed.is_available():
    import torch.distributed._functional_collectives  # the meta kernels of the collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "npu_mm_all_reduce_base"


def npu_mm_all_reduce_base(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    **unsupported: Any,
) -> Tensor:
    """``all_reduce(x1 @ x2 + bias + x3)`` over a process group. Every rank of the group must call it. Inference only.

    Args:
        x1: (M, K) or (B, S, K), contiguous; float32 (CPU and CUDA only), bfloat16 or float16.
        x2: (K, N), contiguous or the transpose of a contiguous weight; the dtype of `x1`.
        hcom: what `communicator_name` gives for the group and the device.
        reduce_op: 'sum'.
        bias: (N,); x3: as the result. Both of the dtype of `x1`, and both part of the sum on every rank.
        unsupported: quantisation, and how the cards communicate; only the defaults.

    Returns:
        (M, N) or (B, S, N) in the dtype of `x1`, the same on every rank.

    Raises:
        ValueError: a shape, dtype or argument that is not supported, or no process group of this name.
    """
    check_arguments(x1, x2, reduce_op, bias, x3, unsupported)
    if is_plain(x1):
        _check_group(hcom)
    functional = torch.ops._c10d_functional
    partial = contribution(x1, x2, bias, x3).float()
    return functional.wait_tensor(functional.all_reduce(partial, reduce_op, hcom)).to(x1.dtype)


def communicator_name(group: ProcessGroup, device: torch.device) -> str:
    """What `hcom` must be for tensors of ``group`` on ``device``. Call it outside of compiled functions.

    On an NPU the first call opens the group's HCCL communicator: every rank of the group must make it.
    """
    if device.type != "npu":
        return str(group.group_name)
    # torch_npu names this argument a rank, and takes the card of that number, modulo the cards of the host.
    card = torch.npu.current_device() if device.index is None else device.index
    hccl: Any = group._get_backend(device)
    return str(hccl.get_hccl_comm_name(card))


def contribution(x1: Tensor, x2: Tensor, bias: Tensor | None, x3: Tensor | None) -> Tensor:
    """What one rank gives to the sum: ``x1 @ x2 + bias``, rounded once, plus ``x3``, rounded once."""
    product = x1 @ x2 if bias is None else (x1.float() @ x2.float() + bias.float()).to(x1.dtype)
    return product if x3 is None else product + x3


def check_arguments(
    x1: Tensor, x2: Tensor, reduce_op: str, bias: Tensor | None, x3: Tensor | None, unsupported: dict[str, Any]
) -> None:
    """Raise ValueError for what the operator does not take."""
    reject_unsupported(OP, unsupported)
    if reduce_op != "sum":
        raise invalid(OP, "reduce_op", reduce_op, "'sum'")
    check_float(OP, "x1", x1)
    if x1.dim() not in (2, 3) or 0 in x1.shape:
        raise invalid(OP, "x1", x1, "(M, K) or (B, S, K), not empty")
    if x2.dim() != 2 or x2.shape[0] != x1.shape[-1] or x2.shape[1] == 0:
        raise invalid(OP, "x2", x2, f"(K, N) with K = {x1.shape[-1]}, the last dimension of x1, not empty")
    given = {name: tensor for name, tensor in (("x2", x2), ("bias", bias), ("x3", x3)) if tensor is not None}
    check_same_dtype(OP, x1, **given)
    result = (*x1.shape[:-1], x2.shape[1])
    if bias is not None and tuple(bias.shape) != result[-1:]:
        raise invalid(OP, "bias", bias, f"(N,) = {result[-1:]}")
    if x3 is not None and tuple(x3.shape) != result:
        raise invalid(OP, "x3", x3, f"the shape of the result, {result}")
    if is_plain(x1) and not x1.is_contiguous():
        raise invalid(OP, "x1", x1, f"contiguous memory, not strides {x1.stride()}; call .contiguous()")
    if is_plain(x2) and not (x2.is_contiguous() or x2.mT.is_contiguous()):
        wanted = f"contiguous memory or its transpose, not strides {x2.stride()}; call .contiguous()"
        raise invalid(OP, "x2", x2, wanted)


def _check_group(hcom: str) -> None:
    registry: Any = torch._C._distributed_c10d
    try:
        registry._resolve_process_group(hcom)
    except RuntimeError as error:
        wanted = "the name of a process group of this process, which communicator_name(group, device) gives"
        raise invalid(OP, "hcom", hcom, wanted) from error
