"""Mixture of experts: gating, sorting rows by expert, grouped products, and putting rows back; sampling filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.eager.operators.linear import fast_gelu

Tensor = torch.Tensor

ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda x: x,
    1: F.relu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    4: fast_gelu,
    5: F.silu,
}
"""act_type of ``npu_grouped_matmul`` -> function."""


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(top k of softmax(x), their experts, row_idx), (…, k) each; row_idx[i, j] = j · rows + i.

    Rows that are ``finished`` get expert E, which none has.
    """
    values, experts = torch.softmax(x.float(), -1).topk(k, -1)
    if finished is not None:
        experts = torch.where(finished.unsqueeze(-1), x.shape[-1], experts)
    rows = values.numel() // k
    places = torch.arange(rows * k, dtype=torch.int32).view(k, rows).t().reshape(values.shape).contiguous()
    return values.to(x.dtype), experts.int(), places


def init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of x sorted by expert, where each went, the sorted experts).

    Args:
        x: (rows, H). row_idx, expert_idx: (rows, k).

    Returns:
        (min(rows, active_num) · k, H), (rows · k,), (rows · k,).
    """
    experts, order = expert_idx.reshape(-1).sort(stable=True)
    source = row_idx.reshape(-1)[order].long()
    destination = torch.empty_like(row_idx.reshape(-1))
    destination[source] = torch.arange(source.numel(), dtype=row_idx.dtype)
    active = min(x.shape[0], active_num) * expert_idx.shape[1]
    return x[source[:active] % x.shape[0]], destination, experts


def compute_expert_tokens(sorted_experts: Tensor, num_expert: int) -> Tensor:
    """How many rows belong to experts 0 … e, for each e."""
    return torch.searchsorted(sorted_experts, torch.arange(num_expert, dtype=sorted_experts.dtype), right=True).to(
        sorted_experts.dtype
    )


def finalize_routing(
    rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    places: Tensor,
    experts: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """out[i] = skip1[i] + skip2[i] + Σ_j scales[i, j] · (rows[places[j · N + i]] + bias[experts[i, j]])"""
    if drop_pad_mode:
        raise NotImplementedError(f"npu_moe_finalize_routing: drop_pad_mode={drop_pad_mode} is not emulated")
    top = scales.shape[1] if scales is not None else k or 1
    count = places.numel() // top
    parts = rows.float()[places.long()].view(top, count, -1).transpose(0, 1)
    if bias is not None:
        if experts is None:
            raise ValueError("npu_moe_finalize_routing: bias needs export_for_source_row")
        parts = parts + bias.float()[experts.long()]
    if scales is not None:
        parts = parts * scales.float().unsqueeze(-1)
    out = parts.sum(1)
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    return out.to(rows.dtype)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    **quantized: Any,
) -> list[Tensor]:
    """Products of groups of rows, each with its own weight: ``y_i = act(x_i @ weight_i + bias_i)``.

    Args:
        x: one tensor per group, or a single one whose rows ``group_list`` divides.
        weight: one (K, N) tensor per group, or a single (groups, K, N).
        group_list: ends of the groups (group_list_type 0) or their sizes (1).
        split_item: 0, 1: one result per group. 2, 3: one for all.
    """
    given = [name for name, value in quantized.items() if value not in (None, [])]
    if given or group_type == 2:
        reason = ", ".join(given) or "group_type=2"
        raise NotImplementedError(f"npu_grouped_matmul: {reason} is not emulated")
    weights = list(weight[0].unbind()) if len(weight) == 1 and weight[0].dim() == 3 else list(weight)
    parts = list(x)
    if len(parts) == 1 and len(weights) > 1:
        parts = _divide(parts[0], group_list, group_list_type or 0)
    if len(parts) != len(weights):
        raise ValueError(f"npu_grouped_matmul: {len(parts)} groups of rows for {len(weights)} weights")
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if bias:
        biases = list(bias[0].unbind()) if len(bias) == 1 and bias[0].dim() == 2 else bias
    act = ACTIVATIONS.get(act_type or 0)
    if act is None:
        raise ValueError(f"npu_grouped_matmul: act_type={act_type} is not one of {sorted(ACTIVATIONS)}")
    results = []
    for part, matrix, addend in zip(parts, weights, biases, strict=True):
        y = part.float() @ matrix.float()
        results.append(act(y if addend is None else y + addend.float()).to(part.dtype))
    if (split_item or 0) < 2:
        return results
    whole = torch.cat(results)
    missing = sum(part.shape[0] for part in x) - whole.shape[0]
    return [F.pad(whole, (0, 0, 0, missing)) if missing else whole]


def _divide(x: Tensor, group_list: Tensor | Sequence[int] | None, kind: int) -> list[Tensor]:
    if group_list is None:
        raise ValueError("npu_grouped_matmul: one x for several weights needs group_list")
    numbers = group_list.tolist() if isinstance(group_list, Tensor) else list(group_list)
    ends = torch.tensor(numbers).cumsum(0).tolist() if kind else numbers
    return [x[first:last] for first, last in pairwise([0, *ends])]


def top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """−inf where a logit is not among the k largest of its row, or not among the likeliest that make up p."""
    values, order = logits.float().sort(stable=True, dim=-1)
    if k is not None:
        threshold = values.gather(-1, values.shape[-1] - k.long().unsqueeze(-1))
        values = values.masked_fill(values < threshold, float("-inf"))
    if p is not None:
        drop = torch.softmax(values, -1).cumsum(-1) <= 1 - p.float().unsqueeze(-1)
        drop[..., -1] = False
        values = values.masked_fill(drop, float("-inf"))
    return torch.empty_like(values).scatter_(-1, order, values).to(logits.dtype)


TABLE: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_init_routing": init_routing,
    "npu_moe_compute_expert_tokens": compute_expert_tokens,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_grouped_matmul": grouped_matmul,
    "npu_grouped_matmul.List": grouped_matmul,
    "npu_top_k_top_p": top_k_top_p,
}
