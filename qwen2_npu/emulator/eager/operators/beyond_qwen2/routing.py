"""Mixture of experts: the predecessors of what Qwen2's experts call; filters of sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu import ops

Tensor = torch.Tensor


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
    "npu_moe_init_routing": init_routing,
    "npu_moe_compute_expert_tokens": compute_expert_tokens,
    "npu_grouped_matmul.List": ops.kernels["npu_grouped_matmul"],
    "npu_top_k_top_p": top_k_top_p,
}
