"""Runs a model teacher-forced: every position of the prompt in one prefill, then token by token through its cache.

The same code drives the stock model of transformers 4.37 and 5.x and this project's, with the arguments that
``generate`` would pass: a mask that grows by one per step, and position_ids counted from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.routing import Choices, Routers, live_columns, watching
from qwen2_npu.conformance.accuracy.stock import exact

Array = npt.NDArray[Any]

UNTIMED_STEPS = 1
"""Decode steps that do not count for tokens/s: the first one pays for what later ones reuse."""


@dataclass(frozen=True)
class Trace:
    """What one model said, at every position that has a token.

    Shapes: B rows, P prompt columns, T decode steps, V vocabulary, H hidden size. ``valid`` (B, P) bool marks the
    tokens of the left-padded prompt; elsewhere logits and hidden states are meaningless. ``decode_logits[:, t]``
    follow token ``forced[:, t]``. Where asked for, ``hidden`` (B, P, H) are the final hidden states of the prompt, and
    ``last_logits`` (B, V) what a prefill with ``logits_to_keep=1`` gave.
    """

    prefill_logits: Array
    decode_logits: Array
    forced: Array
    valid: npt.NDArray[np.bool_]
    hidden: Array | None = None
    last_logits: Array | None = None
    prefill_seconds: float = 0.0
    timed_tokens: int = 0
    decode_seconds: float = 0.0
    """For ``timed_tokens`` tokens: decode without its first step."""
    routing: dict[str, Choices] = field(default_factory=dict)
    """Of a mixture of experts: ``prefill``, ``decode``, and as far as they were asked for ``hidden`` and ``last_token``
    -> what the routers would have chosen in that pass."""
    chosen: Array | None = None
    """(layers, B, P + T, k) of a mixture: the experts that served each token, in the model's own choice or forced."""
    compiled: bool = False
    """Whether logits come from compiled steps, in which no expert was forced. ``routing`` and ``hidden`` are then of
    the same model uncompiled."""


def position_ids_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, S) positions as ``generate`` counts them: tokens before this one in the row, 1 at padding."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


@torch.no_grad()
def run(
    model: Any,
    batch: Batch,
    *,
    decode_steps: int = 0,
    forced: Array | None = None,
    hidden: bool = True,
    last_token: bool = False,
    chosen: Array | None = None,
    uncompiled: bool = False,
) -> Trace:
    """Prefill of ``batch``, then ``decode_steps`` single-token steps through the cache.

    Args:
        model: stock or optimised Qwen2ForCausalLM.
        forced: (B, decode_steps) tokens to feed; None feeds the model's own greedy choice, which is how the baseline
            makes the tokens that the others are forced to.
        hidden: also take the final hidden states. Of the optimised model in a pass of their own, which keeps no cache
            and is not compiled: another way through it than the one with a cache. The stock model has one way, so its
            prefill gives them.
        last_token: also run a prefill with ``logits_to_keep=1``, as ``generate`` does (models that have the argument).
        chosen: (layers, B, P + decode_steps, k) experts to force on a mixture; None for its own choice, which is how
            the baseline makes those that the others are forced to. Compiled steps choose by themselves.
        uncompiled: leave the model's compiled steps alone.
    """
    live = live_columns(batch.attention_mask, decode_steps)
    with without_compiled_steps(model, uncompiled), watching(model, live, chosen) as routers:
        return _run(model, batch, decode_steps, forced, hidden, last_token, routers)


def _run(
    model: Any,
    batch: Batch,
    decode_steps: int,
    forced: Array | None,
    hidden: bool,
    last_token: bool,
    routers: Routers,
) -> Trace:
    device = next(model.parameters()).device
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    rows, width = ids.shape
    prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids_of(mask)}

    routing: dict[str, Choices | None] = {}
    hidden_states = last_logits = None
    apart = hidden and getattr(model, "optimizations", None) is not None
    if apart:  # no more logits than have to be: nobody looks at them
        routers.start(0, width)
        out = model(**prompt, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        hidden_states = to_numpy(out.hidden_states[-1])
        routing["hidden"] = routers.taken()
        del out
    if last_token:
        routers.start(0, width)
        last_logits = to_numpy(model(**prompt, use_cache=True, logits_to_keep=1).logits[:, -1])
        routing["last_token"] = routers.taken()
    routers.start(0, width)
    started = time.perf_counter()
    recorded = {"output_hidden_states": True} if hidden and not apart else {}
    out = model(**prompt, use_cache=True, **recorded, **preallocated(model, rows, width + decode_steps))
    _synchronize(device)
    prefill_seconds = time.perf_counter() - started
    prefill_logits = to_numpy(out.logits)
    if recorded:
        hidden_states = to_numpy(out.hidden_states[-1])
    routing["prefill"] = routers.taken()

    next_token, cache = out.logits[:, -1:].argmax(-1), cache_of(out)
    del out  # its logits take memory
    logits, fed, said, decode_seconds = _decode(model, next_token, cache, mask, decode_steps, forced, routers)
    routing["decode"] = Choices.joined(said) if said else None
    return Trace(
        prefill_logits=prefill_logits,
        decode_logits=np.stack(logits, axis=1) if logits else np.empty((rows, 0, prefill_logits.shape[-1]), np.float32),
        forced=np.stack(fed, axis=1) if fed else np.empty((rows, 0), np.int64),
        valid=batch.attention_mask.bool().numpy(),
        hidden=hidden_states,
        last_logits=last_logits,
        prefill_seconds=prefill_seconds,
        timed_tokens=rows * max(decode_steps - UNTIMED_STEPS, 0),
        decode_seconds=decode_seconds,
        routing={path: choices for path, choices in routing.items() if choices is not None},
        chosen=routers.chosen,
    )


@contextmanager
def without_compiled_steps(model: Any, asked: bool = True) -> Iterator[None]:
    """Within it, ``model`` runs uncompiled."""
    steps = getattr(model, "compiled_steps", None) if asked else None
    if steps:
        model.compiled_steps = {}
    try:
        yield
    finally:
        if steps:
            model.compiled_steps = steps


def _decode(
    model: Any,
    next_token: torch.Tensor,
    cache: Any,
    mask: torch.Tensor,
    decode_steps: int,
    forced: Array | None,
    routers: Routers,
) -> tuple[list[Array], list[Array], list[Choices], float]:
    """Single-token steps after a prefill, the first of which feeds ``next_token`` unless tokens are forced.

    Returns:
        Logits (B, V) of each step, the tokens (B,) fed to it, what the routers said in it, and the seconds of all steps
        but the first :data:`UNTIMED_STEPS`.
    """
    device, rows = mask.device, mask.shape[0]
    steps: list[Array] = []
    fed: list[Array] = []
    said: list[Choices] = []
    timed = 0.0
    positions = mask.sum(dim=1, keepdim=True)
    for step in range(decode_steps):
        token = next_token if forced is None else torch.from_numpy(forced[:, step : step + 1].copy()).to(device)
        routers.start(mask.shape[1], mask.shape[1] + 1)
        mask = torch.cat((mask, mask.new_ones(rows, 1)), dim=1)
        started = time.perf_counter()
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=positions + step,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        _synchronize(device)
        if step >= UNTIMED_STEPS:
            timed += time.perf_counter() - started
        next_token, cache = out.logits[:, -1:].argmax(-1), cache_of(out)
        steps.append(to_numpy(out.logits[:, -1]))
        fed.append(token[:, 0].cpu().numpy())
        if (choices := routers.taken()) is not None:
            said.append(choices)
    return steps, fed, said, timed


@torch.no_grad()
def run_reference(reference: Any, batch: Batch, forced: Array, chosen: Array | None = None) -> Trace:
    """The float64 reference over prompt and forced tokens in one pass: exact arithmetic knows no cache.

    Args:
        reference: from :func:`~qwen2_npu.conformance.accuracy.stock.exact_reference`.
        chosen: (layers, B, P + T, k) experts to force on a mixture.
    """
    ids, mask = prompt_and_forced(batch, forced)
    with exact(reference), watching(reference, mask.bool().numpy(), chosen) as routers:
        routers.start(0, mask.shape[1])
        out = reference(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids_of(mask),
            output_hidden_states=True,
            use_cache=False,
        )
    return reference_trace(batch, forced, out.logits.numpy(), out.hidden_states[-1].numpy(), routers.taken())


def prompt_and_forced(batch: Batch, forced: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P + T) token ids and attention mask of the prompts followed by the forced tokens."""
    ids = torch.cat((batch.input_ids, torch.from_numpy(forced)), dim=1)
    return ids, torch.cat((batch.attention_mask, torch.ones(forced.shape, dtype=torch.int64)), dim=1)


def reference_trace(batch: Batch, forced: Array, logits: Array, hidden: Array, choices: Choices | None = None) -> Trace:
    """The trace of one pass over prompt and forced tokens: logits (B, P + T, V), final hidden states (B, P + T, H), and
    what the routers said."""
    width = batch.input_ids.shape[1]
    return Trace(
        prefill_logits=logits[:, :width],
        decode_logits=logits[:, width:],
        forced=forced,
        valid=batch.attention_mask.bool().numpy(),
        hidden=hidden[:, :width],
        last_logits=logits[:, width - 1],
        routing={} if choices is None else {"prefill": choices.columns(0, width), "decode": choices.columns(width)},
    )


def preallocated(model: Any, rows: int, capacity: int) -> dict[str, Any]:
    """The cache that a model with a fixed one wants up front; the others grow theirs."""
    optimizations = getattr(model, "optimizations", None)
    if optimizations is None or not optimizations.fixed_kv_cache:
        return {}
    return {CACHE_NAME: model.allocate_cache(rows, capacity)}


def to_numpy(tensor: torch.Tensor) -> Array:
    """Copied out: a compiled graph may reuse its output buffers."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format).numpy()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
