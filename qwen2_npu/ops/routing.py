"""The npu_moe_ operators: which experts a row goes to, its copies sorted by expert, and what the experts give summed.

Between the last two, the experts compute: npu_grouped_matmul. Every shape follows from the arguments' shapes, and no
value is read on the host but for checks on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid, is_readable, reject_unsupported

MAX_K = 1024
MAX_EXPERTS = 10240

CUMULATIVE, COUNT = 0, 1
"""expert_tokens_num_type."""
GATHER, SCATTER = 0, 1
"""row_idx_type."""
BY_COLUMN, BY_ROW = 0, 2
"""drop_pad_mode: the order of the row index. The others, 1 and 3, pad every expert to a capacity."""


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of softmax(x) in each row, not normalised again; float32 inside, one rounding.

    Of equal values the lower expert comes first.

    Args:
        x: (rows, experts) or (B, S, experts); float32, bfloat16 or float16.
        finished: bool, (rows,) or (B, S): these rows get expert number ``experts``, which none has.
        k: 1 to the number of experts, at most 1024.

    Returns:
        (values, experts, row numbers), (..., k) each: the values in the dtype of `x`, in descending order; the experts
        as int32; row number [i, j] is j · rows + i, as int32.

    Raises:
        ValueError: a shape, dtype or `k`.
    """
    op = "npu_moe_gating_top_k_softmax"
    check_float(op, "x", x)
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise invalid(op, "x", x, "(rows, experts) or (B, S, experts)")
    if not 0 < k <= min(x.shape[-1], MAX_K):
        raise invalid(op, "k", k, f"1 to {min(x.shape[-1], MAX_K)}: as many as x has experts, at most {MAX_K}")
    if finished is not None and (finished.dtype != torch.bool or finished.shape != x.shape[:-1]):
        raise invalid(op, "finished", finished, f"a torch.bool tensor of shape {tuple(x.shape[:-1])}")
    values, experts = torch.softmax(x.float(), -1).sort(dim=-1, descending=True, stable=True)
    chosen = experts[..., :k].int()
    if finished is not None:
        chosen = chosen.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    rows = x.shape[:-1].numel()
    numbers = torch.arange(rows * k, dtype=torch.int32, device=x.device).view(k, rows).t()
    return values[..., :k].to(x.dtype, copy=True), chosen, numbers.reshape(chosen.shape).contiguous()


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = CUMULATIVE,
    expert_tokens_num_flag: bool = False,
    active_expert_range: Sequence[int] = [],
    row_idx_type: int = GATHER,
    **unsupported: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One copy of a row for each of its experts, sorted by expert; rows of one expert keep their order.

    Args:
        x: (rows, H); float32, bfloat16 or float16.
        expert_idx: int32 (rows, k): 0 to `expert_num`, which is no expert.
        active_num: -1, 0 or rows · k: all copies.
        expert_num: 1 to 10240.
        expert_tokens_num_type: 0: where each expert's copies end; 1: how many it has.
        expert_tokens_num_flag: True.
        active_expert_range: (first, end): copies for other experts come last and are in no group. Default: all.
        row_idx_type: 0: where copy j of row i went, at i · k + j, and -1 if to no active expert. 1: the reverse, the
            number i · k + j of every copy in its new order.
        unsupported: quantisation, and experts of fixed capacity; only the defaults.

    Returns:
        (copies (rows · k, H), index int32 (rows · k,), ends or sizes int64 (active experts,), zeros float32
        (rows · k,)). Copies for no active expert, and their places in an index of type 1, are undefined on an NPU.

    Raises:
        ValueError: a shape, dtype, number or argument that is not supported.
    """
    op = "npu_moe_init_routing_v2"
    reject_unsupported(op, unsupported)
    first, end = _check_routing(op, x, expert_idx, active_num, expert_num, active_expert_range)
    if expert_tokens_num_type not in (CUMULATIVE, COUNT):
        raise invalid(op, "expert_tokens_num_type", expert_tokens_num_type, "0 (ends) or 1 (sizes)")
    if not expert_tokens_num_flag:
        raise invalid(op, "expert_tokens_num_flag", expert_tokens_num_flag, "True")
    if row_idx_type not in (GATHER, SCATTER):
        raise invalid(op, "row_idx_type", row_idx_type, "0 (gather) or 1 (scatter)")
    flat = expert_idx.reshape(-1)
    if (first, end) != (0, expert_num):
        flat = flat.masked_fill((flat < first) | (flat >= end), expert_num)
    experts, order = flat.sort(stable=True)
    active = torch.arange(first, end, dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(experts, active, right=True)
    copies = x.index_select(0, order // max(expert_idx.shape[1], 1))
    index = order.int()
    if row_idx_type == GATHER:
        places = torch.arange(order.numel(), dtype=torch.int32, device=x.device)
        index = torch.empty_like(places).scatter_(0, order, torch.where(places < ends[-1], places, -1))
    sizes = ends if expert_tokens_num_type == CUMULATIVE else torch.diff(ends, prepend=ends.new_zeros(1))
    return copies, index, sizes, x.new_zeros(order.numel(), dtype=torch.float32)


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = BY_COLUMN,
    k: int | None = 1,
) -> Tensor:
    """``skip1 + skip2 + Σ_j scales[:, j] · (rows[place of copy j] + bias[expert of copy j])``; float32 inside.

    Args:
        expanded_permuted_rows: (rows · k, H), what the experts gave; float32, bfloat16 or float16.
        skip1, skip2: (rows, H), of the same dtype; `skip2` with `skip1` only.
        bias: (experts, H), of the same dtype.
        scales: (rows, k), of the same dtype, or float32 where that is bfloat16; None: one copy, which counts 1.
        expanded_src_to_dst_row: int32 (rows · k,): in which row of the first argument copy j of row i is. It stands
            at j · rows + i (`drop_pad_mode` 0) or at i · k + j (2, the index of npu_moe_init_routing_v2).
        export_for_source_row: int32 (rows, k), the expert of each copy; read with a `bias` only.
        drop_pad_mode: 0 or 2.
        k: 1 where there are no `scales`; not read where there are.

    Returns:
        (rows, H), rounded once.

    Raises:
        ValueError: a shape, dtype, number or place that does not fit.
    """
    op = "npu_moe_finalize_routing"
    expanded, index = expanded_permuted_rows, expanded_src_to_dst_row
    if drop_pad_mode not in (None, BY_COLUMN, BY_ROW):
        raise invalid(op, "drop_pad_mode", drop_pad_mode, "0 (index by column) or 2 (by row)")
    rows, top = _check_places(op, expanded, index, scales, k)
    _check_addends(op, expanded, rows, skip1, skip2)
    _check_expert_bias(op, expanded, bias, export_for_source_row, (rows, top))
    places = index.view(rows, top).t() if drop_pad_mode == BY_ROW else index.view(top, rows)
    out = expanded.new_zeros(rows, expanded.shape[1], dtype=torch.float32)
    for skip in (skip1, skip2):
        if skip is not None:
            out.add_(skip)
    for copy in range(top):
        part = expanded.index_select(0, places[copy]).float()
        if bias is not None and export_for_source_row is not None:
            part = part + bias.index_select(0, export_for_source_row[:, copy])
        out = out.add_(part) if scales is None else out.addcmul_(part, scales[:, copy, None].float())
    return out.to(expanded.dtype)


# ---- checks ---------------------------------------------------------------------------------------------------------
def _check_routing(
    op: str, x: Tensor, expert_idx: Tensor, active_num: int, expert_num: int, active: Sequence[int]
) -> tuple[int, int]:
    """First and end of the active experts."""
    check_float(op, "x", x)
    if x.dim() != 2:
        raise invalid(op, "x", x, "(rows, H)")
    if expert_idx.dtype != torch.int32 or expert_idx.dim() != 2 or expert_idx.shape[0] != x.shape[0]:
        raise invalid(op, "expert_idx", expert_idx, f"a torch.int32 tensor ({x.shape[0]}, k): one row per row of x")
    if not 0 < expert_num <= MAX_EXPERTS:
        raise invalid(op, "expert_num", expert_num, f"1 to {MAX_EXPERTS}")
    if active_num not in (-1, 0, expert_idx.numel()):
        raise invalid(op, "active_num", active_num, f"-1, 0 or {expert_idx.numel()}, rows · k: all copies")
    first, end = active or (0, expert_num)
    if not 0 <= first < end <= expert_num:
        raise invalid(op, "active_expert_range", list(active), f"(first, end) with 0 <= first < end <= {expert_num}")
    _check_range(op, "expert_idx", expert_idx, expert_num + 1, "experts, or expert_num for none of them")
    return first, end


def _check_places(op: str, expanded: Tensor, index: Tensor, scales: Tensor | None, k: int | None) -> tuple[int, int]:
    """How many rows there are, and copies of each."""
    check_float(op, "expanded_permuted_rows", expanded)
    if expanded.dim() != 2:
        raise invalid(op, "expanded_permuted_rows", expanded, "(rows · k, H)")
    if index.dtype != torch.int32 or index.dim() != 1 or index.shape[0] != expanded.shape[0]:
        wanted = f"a torch.int32 tensor of shape ({expanded.shape[0]},): one place per expanded row"
        raise invalid(op, "expanded_src_to_dst_row", index, wanted)
    _check_range(op, "expanded_src_to_dst_row", index, expanded.shape[0], "rows of expanded_permuted_rows")
    copies = index.shape[0]
    if scales is None:
        if k not in (None, 1):
            raise invalid(op, "k", k, "1 where there are no scales")
        return copies, 1
    mixed = expanded.dtype == torch.bfloat16 and scales.dtype == torch.float32
    if scales.dtype != expanded.dtype and not mixed:
        raise invalid(op, "scales", scales, f"{expanded.dtype}, or torch.float32 beside torch.bfloat16")
    if scales.dim() != 2 or scales.numel() != copies or scales.shape[1] == 0:
        raise invalid(op, "scales", scales, f"(rows, k) with rows · k = {copies}, the expanded rows")
    return scales.shape[0], scales.shape[1]


def _check_addends(op: str, expanded: Tensor, rows: int, skip1: Tensor | None, skip2: Tensor | None) -> None:
    shape = (rows, expanded.shape[1])
    if skip1 is None and skip2 is not None:
        raise invalid(op, "skip2", skip2, "None where skip1 is None")
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            check_same_dtype(op, expanded, **{name: skip})
            if tuple(skip.shape) != shape:
                raise invalid(op, name, skip, f"the shape of the result, {shape}")


def _check_expert_bias(
    op: str, expanded: Tensor, bias: Tensor | None, experts: Tensor | None, shape: tuple[int, int]
) -> None:
    if experts is not None and (experts.dtype != torch.int32 or tuple(experts.shape) != shape):
        raise invalid(op, "export_for_source_row", experts, f"a torch.int32 tensor of shape {shape}")
    if bias is None:
        return
    check_same_dtype(op, expanded, bias=bias)
    if bias.dim() != 2 or bias.shape[1] != expanded.shape[1]:
        raise invalid(op, "bias", bias, f"(experts, {expanded.shape[1]})")
    if experts is None:
        raise invalid(op, "export_for_source_row", None, "the expert of each copy, where there is a bias")
    _check_range(op, "export_for_source_row", experts, bias.shape[0], "experts that the bias has")


def _check_range(op: str, name: str, index: Tensor, end: int, of: str) -> None:
    """Where the values can be read at no cost: the device checks none."""
    if is_readable(index) and index.numel():
        least, largest = (int(bound) for bound in index.aminmax())
        if least < 0 or largest >= end:
            raise invalid(op, name, [least, largest], f"numbers from 0 to {end - 1}: {of}")
