"""Compilation of the model's two steps, prefill and decode.

Only the steps are compiled: one graph per (batch, prompt length) and one per (batch, cache capacity). Everything that
runs once per call on the host (row compaction, masks, cache accounts) stays outside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from qwen2_npu.errors import UnsupportedError

if TYPE_CHECKING:
    from qwen2_npu.models.attention import AttentionInputs
    from qwen2_npu.models.qwen2 import LayerCache, Qwen2ForCausalLM

MODES: tuple[str, ...] = ("eager", "inductor")
"""Modes of :func:`compile_model` that this version serves."""

EXE_MODE = "EXE_MODE"
"""Environment variable naming the mode when none is passed, as in the upstream guide."""

BACKENDS: dict[str, str] = {"inductor": "inductor"}
"""Mode -> torch.compile backend."""


# One graph per shape is what is wanted: dynamo's limits, meant against endless recompilation, would stop at eight.
_LIMITS = {"recompile_limit": 1024, "accumulated_recompile_limit": 8192}
_NO_CACHE = {"enable_autograd_cache": False}  # see _inductor_options


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
            f"mode={chosen!r} needs the fixed_kv_cache step: with a growing cache every decode step has new "
            "shapes and would "
            f"compile again; use optimizations with fixed_kv_cache on"
        )
    model.compiled_steps = {
        "prefill": _compile(model.prefill_step, BACKENDS[chosen]),
        "decode": _compile(model.decode_step, BACKENDS[chosen]),
    }
    return model


def _compile(step: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    # Tensors are static (a bucket is a graph); the live lengths, integers on the host, are what is dynamic.
    options = _inductor_options() if backend == "inductor" else None
    compiled = torch.compile(step, backend=backend, dynamic=True, fullgraph=True, options=options)

    def run(
        tokens: torch.Tensor, inputs: AttentionInputs, caches: list[LayerCache], *logit_index: torch.Tensor | None
    ) -> torch.Tensor:
        # Slices of growing tensors have other strides every step, even where a size of 1 hides it; copies have not.
        tokens, inputs = _copied(tokens), inputs._replace(position_ids=_copied(inputs.position_ids))
        rest = [None if index is None else _copied(index) for index in logit_index]
        for leaf in _pytree.tree_leaves((tokens, inputs, caches, rest)):
            if isinstance(leaf, torch.Tensor):
                torch._dynamo.mark_static(leaf)
        with torch.no_grad(), torch._dynamo.config.patch(_LIMITS), torch._functorch.config.patch(_NO_CACHE):
            return compiled(tokens, inputs, caches, *rest)

    return run


def _inductor_options() -> dict[str, Any]:
    from qwen2_npu.small_batch import SmallBatchProducts

    return {
        "post_grad_custom_pre_pass": SmallBatchProducts(),
        # A graph from the disk cache is guarded by the order of the rows' lengths, and another batch would compile
        # again.
        "fx_graph_cache": False,
    }


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
