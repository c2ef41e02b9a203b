"""Compilation of the model's two steps, prefill and decode.

Only the steps are compiled: one graph per (batch, prompt length) and one per (batch, cache capacity). Everything that runs once
per call on the host (row compaction, masks, cache accounts) stays outside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qwen2_npu.errors import UnsupportedError

if TYPE_CHECKING:
    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM

MODES: tuple[str, ...] = ("eager", "inductor")
"""Modes of :func:`compile_model` that this version serves."""

EXE_MODE = "EXE_MODE"
"""Environment variable naming the mode when none is passed, as in the upstream guide."""

INDUCTOR_CPU_OPTIONS: dict[str, Any] = {
    # Weights become constants of the graph, prepacked for the small batches of decode.
    "freezing": True,
}


def parse_mode(mode: str | None) -> str:
    """``mode``, or what EXE_MODE says, or "eager".

    Raises:
        UnsupportedError: an unknown mode, with the known ones.
    """
    source = f"mode={mode!r}" if mode is not None else f"{EXE_MODE}={os.environ.get(EXE_MODE)!r}"
    chosen = mode if mode is not None else os.environ.get(EXE_MODE, "eager")
    if chosen not in MODES:
        raise UnsupportedError(f"{source}: supported modes are {', '.join(MODES)}")
    return chosen


def compile_model(model: Qwen2ForCausalLM, mode: str | None = None) -> Qwen2ForCausalLM:
    """Compile prefill and decode of ``model``, in place; the caller's code stays the same.

    Args:
        mode: "eager" (nothing compiled), "inductor", or None to take it from EXE_MODE.

    Returns:
        ``model``.

    Raises:
        UnsupportedError: an unknown mode, or a model whose cache is not fixed: its shapes change every step.
    """
    chosen = parse_mode(mode)
    model.compiled_steps = {}
    if chosen == "eager":
        return model
    if not model.optimizations.fixed_kv_cache:
        raise UnsupportedError(
            f"mode={chosen!r} needs the fixed_kv_cache step: with a growing cache every decode step has new shapes and would "
            f"compile again; use optimizations with fixed_kv_cache on"
        )
    model.compiled_steps = {
        "prefill": _compile_inductor(model.prefill_step),
        "decode": _compile_inductor(model.decode_step),
    }
    return model


def _compile_inductor(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # dynamic=None would compile the first shapes statically and the next ones again; tensors are static here (a bucket is a
    # graph), and the lengths on the host are dynamic integers.
    compiled = torch.compile(step, backend="inductor", dynamic=True, fullgraph=True)

    def run(tokens: torch.Tensor, inputs: Any, caches: list[Any], *rest: Any) -> torch.Tensor:
        for tensor in _tensors((tokens, inputs, caches, rest)):
            torch._dynamo.mark_static(tensor)
        with torch.no_grad():
            return compiled(tokens, inputs, caches, *rest)

    return run


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
