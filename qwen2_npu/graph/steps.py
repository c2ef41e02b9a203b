"""Calling a compiled step: inputs in a form that makes equal shapes equal graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

if TYPE_CHECKING:
    from qwen2_npu.models.attention import AttentionInputs
    from qwen2_npu.models.decoder import LayerCache

DYNAMO = {
    # One graph per shape is what is wanted: dynamo's limits, meant against endless recompilation, would stop at eight.
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 8192,
    # eps and scale are constants; as symbols they would be tried, given up, and the graph compiled a second time.
    "specialize_float": True,
}
"""dynamo's settings around a compiled step."""

_NO_CACHE = {"enable_autograd_cache": False}  # see qwen2_npu.graph.inductor

MARK = "_dynamo_static_indices"
"""What ``torch._dynamo.mark_static`` leaves on a tensor."""

Step = Callable[..., torch.Tensor]


class CompiledStep:
    """``prefill_step`` or ``decode_step`` of a model, compiled on first use per shape.

    Args:
        compiler: turns the step into its compiled form.
    """

    def __init__(self, step: Step, compiler: Callable[[Step], Step]) -> None:
        self.step = step
        self.compiled = compiler(step)

    def __call__(
        self, tokens: torch.Tensor, inputs: AttentionInputs, caches: list[LayerCache], *logit_index: torch.Tensor | None
    ) -> torch.Tensor:
        """What the step returns; see ``Qwen2ForCausalLM.prefill_step`` and ``decode_step``."""
        # Slices of growing tensors have other strides every step, even where a size of 1 hides it; copies have not.
        tokens, inputs = _copied(tokens), inputs._replace(position_ids=_copied(inputs.position_ids))
        rest = [None if index is None else _copied(index) for index in logit_index]
        arguments = (tokens, inputs, caches, *rest)
        mark_static(arguments)
        settings = torch._dynamo.config.patch(DYNAMO), torch._functorch.config.patch(_NO_CACHE)
        with torch.no_grad(), current_card(tokens.device), settings[0], settings[1]:
            return self.compiled(*arguments)


def current_card(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one, where it is a card: graphs are captured and run on the stream of that one,
    whichever card their tensors are on."""
    if device.index is None:
        return nullcontext()
    card: AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return card


def mark_static(arguments: Any) -> None:
    """Tensors are static: a bucket is a graph. What is dynamic are the live lengths, integers on the host."""
    for leaf in _pytree.tree_leaves(arguments):
        # The caches come back every step: marking them again would cost more host time than all the rest.
        if isinstance(leaf, torch.Tensor) and not hasattr(leaf, MARK):
            torch._dynamo.mark_static(leaf)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
