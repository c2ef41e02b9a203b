"""The named intermediate tensors of a block of experts, in the same form from the stock model and from this project's.

How the tokens are grouped by expert is each model's own affair. So the products of the experts are asked for in a form
that both understand: the block computes one expert of each token at a time, with weight 1 and nothing added. That is
the model's own code, whatever operators it is made of, and tells a wrong product from a wrong combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qwen2_npu.conformance.accuracy.intermediates import PassRecorder

COMBINING_OPERATORS = ("npu_moe_finalize_routing",)


def expert_hooks(
    block: Any, layer: int, capture: PassRecorder, mlp: Callable[[Any, int, PassRecorder, str], Iterator[Any]]
) -> Iterator[Any]:
    """Registers hooks on the block of a layer; yields their handles.

    Points, in order: ``router`` (logits), ``shared …`` (the expert of all tokens) with its ``shared gate``, ``routing
    weights`` (of every expert, 0 of those not chosen), ``expert products`` (of the chosen ones, by number) and
    ``combination``.

    Args:
        mlp: registers those of an ordinary MLP, whose names begin with the given prefix.
    """
    routing: list[str] = []

    def router(module: Any, args: Any, output: Any) -> None:
        capture.add(layer, "router", output[0] if isinstance(output, tuple) else output)

    def shared_gate(module: Any, args: Any, output: torch.Tensor) -> None:
        routing[:], capture.pending[:] = capture.pending, []
        capture.add(layer, "shared gate", output)

    def experts(module: Any, args: Any) -> None:
        x, weights, chosen = args[:3]
        if not weights.is_floating_point():  # the stock block takes them in the other order
            weights, chosen = chosen, weights
        ran = [*routing, *capture.pending]
        numbers, order = chosen.detach().cpu().long().sort(dim=-1)
        capture.pending[:] = [name for name in ran if "top_k" in name]
        every = torch.zeros(len(x), block.gate.weight.shape[0], dtype=weights.dtype)
        capture.add(layer, "routing weights", every.scatter_(1, numbers, weights.detach().cpu().gather(1, order)))
        products = torch.cat([_product(module, x, number[:, None].to(chosen)) for number in numbers.unbind(1)], dim=-1)
        capture.pending[:] = [name for name in capture.pending if name not in COMBINING_OPERATORS]
        capture.add(layer, "expert products", products)

    def combination(module: Any, args: Any, output: torch.Tensor) -> None:
        capture.pending[:] = [name for name in capture.pending if name in COMBINING_OPERATORS]
        capture.add(layer, "combination", output)

    yield block.gate.register_forward_hook(router)
    yield block.shared_expert_gate.register_forward_hook(shared_gate)
    yield from mlp(block.shared_expert, layer, capture, "shared ")
    yield block.experts.register_forward_pre_hook(experts)
    yield block.register_forward_hook(combination)


def _product(module: Any, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """(T, H): what one expert (T, 1) makes of each token."""
    one = torch.ones(expert.shape, dtype=x.dtype, device=x.device)
    if hasattr(module, "fused"):
        return module.forward(x, one, expert, torch.zeros_like(x))
    return module.forward(x, expert, one)
