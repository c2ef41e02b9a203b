"""Negative controls of a mixture of experts, in the manner of ``faults``. All act on the step ``fused_moe``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.optimizations import EXPERTS
from tests.accuracy.faults import Arguments, Fault

STEP = EXPERTS[0]


def _of_blocks(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """What ``change`` does to each block of experts of a model that has the step."""

    def patch(model: Any) -> None:
        for layer in model.model.layers:
            if model.optimizations.fused_moe and hasattr(layer.mlp, "experts"):
                change(layer.mlp)

    return patch


def _other_normalisation(block: Any) -> None:
    block.normalised = not block.normalised


def _drop_shared_gate(block: Any) -> None:
    right = block.shared_expert_gate.forward
    block.shared_expert_gate.forward = lambda x: torch.full_like(right(x), 30.0)  # its sigmoid is 1


def _next_experts(block: Any) -> None:
    right = block.route

    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = right(x)
        return weights, (chosen + 1) % block.experts.count

    block.route = route


def _swap_scales(arguments: Arguments) -> None:
    arguments["scales"] = arguments["scales"].flip(-1)


def _round_logits(arguments: Arguments) -> None:
    arguments["x"] = arguments["x"].bfloat16().to(arguments["x"].dtype)


def _neighbours(arguments: Arguments) -> None:
    arguments["weight"] = [weight.roll(1, 0) for weight in arguments["weight"]]


EXPERT_FAULTS: tuple[Fault, ...] = (
    Fault(
        "top_k_normalisation",
        "the weights of the chosen experts are divided by their sum where they must not be",
        step=STEP,
        place=r"layer 0, routing weights \(npu_moe_gating_top_k_softmax\)",
        patch=_of_blocks(_other_normalisation),
    ),
    Fault(
        "shared_gate_dropped",
        "the shared expert is added as it is, without its gate",
        step=STEP,
        place=r"layer 0, shared gate \(linear\)",
        patch=_of_blocks(_drop_shared_gate),
    ),
    Fault(
        "finalize_weights_permuted",
        "the products of a token's experts are weighted with each other's weights",
        step=STEP,
        place=r"layer 0, combination \(npu_moe_finalize_routing\)",
        alter={"npu_moe_finalize_routing": _swap_scales},
    ),
    Fault(
        "router_in_bfloat16",
        "softmax and top-k see the router's logits rounded to bfloat16",
        step=STEP,
        place=r"layer 0, routing weights \(npu_moe_gating_top_k_softmax\)",
        alter={"npu_moe_gating_top_k_softmax": _round_logits},
    ),
    Fault(
        "neighbour_s_weights",
        "the tokens of each expert are multiplied with the weights of the one before it",
        step=STEP,
        place=r"layer 0, expert products \(.*npu_grouped_matmul.*\)",
        alter={"npu_grouped_matmul": _neighbours},
    ),
    Fault(
        "other_experts",
        "each token goes to the experts after those that the router prefers",
        step=STEP,
        place=r"the router chooses others; routing in hidden, layer 0 row 0 position 0: baseline chooses expert",
        patch=_of_blocks(_next_experts),
    ),
)
