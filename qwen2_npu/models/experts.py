"""The MLP of a mixture of experts: a router, the experts that it chooses for each token, and one for all tokens.

Formula (Qwen2 technical report, arXiv:2407.10671, section 2.2.2): ``Σ_k p_k · expert_k(x) + sigmoid(g(x)) · shared(x)``
with the k largest of ``p = softmax(router(x))``, divided by their sum where ``norm_topk_prob`` says so.

Shapes: T tokens, H hidden, E experts, I columns of one expert, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen2_npu.models.layers import MLP, Linear
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.collectives import ALONE, Ranks

COUNTS, ROWS = 1, 2
"""How the operators number things: sizes of the groups in place of their ends; the places of a token's copies."""


class Experts(nn.Module):
    """The weights of all experts, each matrix (K, N) as grouped products take it.

    Attributes:
        gate_up_proj: (E, H, 2·I), columns [gate; up].
        down_proj: (E, I, H).
    """

    def __init__(self, config: Any, optimizations: Optimizations, ranks: Ranks) -> None:
        super().__init__()
        self.fused = optimizations.fused_moe
        self.count: int = config.num_experts
        hidden, columns = config.hidden_size, ranks.shard.count("expert columns", config)
        self.gate_up_proj = nn.Parameter(torch.empty(self.count, hidden, 2 * columns))
        self.down_proj = nn.Parameter(torch.empty(self.count, columns, hidden))

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, shared: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) -> (T, H): what the chosen experts make of each token, weighted, and ``shared`` added.

        Args:
            weights: (T, k), of the dtype of ``x``.
            chosen: (T, k) int32, the experts.
            shared: (T, H).
        """
        return (self._grouped if self.fused else self._one_by_one)(x, weights, chosen, shared)

    def _grouped(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, shared: torch.Tensor
    ) -> torch.Tensor:
        """Tokens sorted by expert, one product for all: shapes follow from T and k, whatever the router chooses."""
        rows, index, sizes, _ = torch.ops.npu.npu_moe_init_routing_v2(
            x,
            chosen,
            active_num=chosen.numel(),
            expert_num=self.count,
            expert_tokens_num_type=COUNTS,
            expert_tokens_num_flag=True,
            active_expert_range=[0, self.count],
        )
        groups: dict[str, Any] = {"group_list": sizes, "split_item": 3, "group_type": 0, "group_list_type": COUNTS}
        (gate_up,) = torch.ops.npu.npu_grouped_matmul([rows], [self.gate_up_proj], **groups)
        inner = torch.ops.npu.npu_swiglu(gate_up, dim=-1)
        (rows,) = torch.ops.npu.npu_grouped_matmul([inner], [self.down_proj], **groups)
        return torch.ops.npu.npu_moe_finalize_routing(
            rows, shared, None, None, weights, index, None, drop_pad_mode=ROWS
        )

    def _one_by_one(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, shared: torch.Tensor
    ) -> torch.Tensor:
        """Expert after expert, as the stock model: which ones is looked up on the host."""
        found = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, place = torch.where(chosen == expert)
            gate, up = (x[rows] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = (F.silu(gate) * up) @ self.down_proj[expert]
            found.index_add_(0, rows, inner * weights[rows, place, None])
        return found + shared


class SparseMLP(nn.Module):
    """See the module's text. Of several ranks each holds some columns of every expert; the router is on all."""

    def __init__(self, config: Any, optimizations: Optimizations, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.top_k: int = config.num_experts_per_tok
        self.normalised: bool = config.norm_topk_prob
        self.fused = optimizations.fused_moe
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config, optimizations, ranks)
        self.shared_expert = MLP(config, optimizations, ALONE, ranks.shard.count("shared columns", config))
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor, phase: str = "decode") -> torch.Tensor:
        """(B, S, H) -> (B, S, H)."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        shared = torch.sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        # The ranks' parts of both are added up at once.
        return self.ranks.all_reduce(self.experts(rows, weights, chosen, shared)).view(x.shape)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, H) -> weights and numbers (int32) of the chosen experts, (T, k) each, the heaviest first.

        Softmax and sum are in float32; the weights are rounded once, to the dtype of ``x``.
        """
        logits = self.gate(x)
        if self.fused:  # the operator computes in float32 whatever it is given, and rounds its result to that
            logits = logits.float() if self.normalised else logits
            weights, chosen, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(logits, k=self.top_k)
        else:
            weights, chosen = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
            chosen = chosen.int()
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), chosen
