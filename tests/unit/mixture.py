"""The block of experts of Qwen2-57B-A14B as calls of the npu:: operators, and the same as dense products in float64;
and a small model with such blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu
from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import CONFIGURATIONS
from tests.unit.small import small_stock, stock_weights

npu = torch.ops.npu


class Experts(NamedTuple):
    """The block's weights: ``gate_up`` (E, H, 2I) and ``down`` (E, I, H) as the grouped product takes them, all others
    as nn.Linear keeps them."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor
    shared_down: Tensor
    shared_gate: Tensor


class Sizes(NamedTuple):
    """Its dimensions."""

    hidden: int
    experts: int
    top: int
    intermediate: int
    shared: int

    def shapes(self) -> Experts:
        """Of every weight."""
        h, e, _, i, s = self
        return Experts((e, h), (e, h, 2 * i), (e, i, h), (2 * s, h), (h, s), (1, h))  # type: ignore[arg-type]

    def random(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Experts:
        """Weights whose products have the size of what goes in; the router's tell the experts apart."""
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in self.shapes()]
        return Experts(*(weight.to(device, dtype) for weight in (made[0] * 3, *made[1:])))


REAL = Sizes(hidden=3584, experts=64, top=8, intermediate=2560, shared=20480)
"""Qwen2-57B-A14B's."""

SMALL = Sizes(hidden=32, experts=8, top=3, intermediate=16, shared=48)


def route(x: Tensor, router: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The copies of the rows in the order of the experts, where each went, copies per expert, and their weights."""
    weights, experts, _ = npu.npu_moe_gating_top_k_softmax(F.linear(x, router), None, top)
    copies, index, sizes, _ = npu.npu_moe_init_routing_v2(
        x,
        experts,
        active_num=x.shape[0] * top,
        expert_num=router.shape[0],
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, router.shape[0]],
        quant_mode=-1,
        row_idx_type=0,
    )
    return copies, index, sizes, weights


def grouped(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """One product per expert."""
    return npu.npu_grouped_matmul([x], [weight], group_list=sizes, split_item=2, group_type=0, group_list_type=1)[0]


def block(x: Tensor, w: Experts, top: int) -> Tensor:
    """(rows, H) to (rows, H)."""
    copies, index, sizes, weights = route(x, w.router, top)
    routed = grouped(npu.npu_swiglu(grouped(copies, w.gate_up, sizes)), w.down, sizes)
    shared = F.linear(npu.npu_swiglu(F.linear(x, w.shared_gate_up)), w.shared_down)
    shared = torch.sigmoid(F.linear(x, w.shared_gate)) * shared
    return npu.npu_moe_finalize_routing(routed, shared, None, None, weights, index, None, drop_pad_mode=2)


def dense(x: Tensor, w: Experts, top: int) -> Tensor:
    """Every expert on every row, those not chosen counted zero times; the router's logits in the dtype of ``x``."""
    logits = F.linear(x, w.router).double().cpu()
    x, w = x.double().cpu(), Experts(*(weight.double().cpu() for weight in w))
    values, experts = (found[:, :top] for found in torch.softmax(logits, -1).sort(descending=True, stable=True))
    weights = torch.zeros(x.shape[0], w.router.shape[0], dtype=torch.float64).scatter_(1, experts, values)
    every = torch.einsum("ern,enh->erh", _swiglu(torch.einsum("rh,ehn->ern", x, w.gate_up)), w.down)
    shared = torch.sigmoid(x @ w.shared_gate.mT) * (_swiglu(x @ w.shared_gate_up.mT) @ w.shared_down.mT)
    return torch.einsum("re,erh->rh", weights, every) + shared


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# ---- a model --------------------------------------------------------------------------------------------------------
needs_mixtures = pytest.mark.skipif(
    "qwen2_moe" not in CONFIGURATIONS, reason="transformers 4.37.0 has no mixture of experts"
)


def mixture_config(**changes: Any) -> Any:
    """One layer of eight experts, of which each token goes to three."""
    values: dict[str, Any] = {
        "vocab_size": 199, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    }  # fmt: skip
    return CONFIGURATIONS["qwen2_moe"](**(values | changes))


def mixture(
    optimizations: Optimizations | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen2ForCausalLM:
    """The small model with random weights, eager."""
    config = mixture_config()
    stock = small_stock(config)
    model = Qwen2ForCausalLM.from_state_dict(
        config, stock_weights(stock), device=device, dtype=dtype, optimizations=optimizations
    )
    return model.eval()
