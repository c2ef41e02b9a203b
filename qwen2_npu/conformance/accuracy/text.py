"""Perplexity of held-out text and greedy texts side by side: what a reader understands without the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen2_npu.conformance.accuracy import teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.compare import log_softmax
from qwen2_npu.conformance.accuracy.locate_error import Divergence, divergences
from qwen2_npu.conformance.accuracy.noise import Array, ErrorRatio, error_ratio
from qwen2_npu.conformance.accuracy.stock import exact


@dataclass(frozen=True)
class Perplexity:
    """Of the same tokens under both models. ``error``: RMS of the tokens' losses against float64."""

    tokens: int
    baseline: float
    optimised: float
    error: ErrorRatio

    @property
    def passed(self) -> bool:
        return self.error.within


@torch.no_grad()
def token_losses(model: Any, windows: Sequence[Sequence[int]]) -> Array:
    """-log p of every token but the first of each window, in nats, float64, window after window."""
    device = next(model.parameters()).device
    losses = []
    for window in windows:
        ids = torch.tensor([list(window)], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        losses.append(losses_of(logits.detach().to("cpu", torch.float64).numpy(), window))
    return np.concatenate(losses)


def losses_of(logits: Array, window: Sequence[int]) -> Array:
    """(N - 1, V) float64 logits after all but the last of a window's N tokens -> -log p of all but the first."""
    return -log_softmax(logits)[np.arange(len(window) - 1), np.asarray(window[1:])]


def text_windows(token_ids: Sequence[int], *, length: int, limit: int) -> list[list[int]]:
    """The first ``limit`` tokens cut into windows of ``length``; a last window of one token is dropped."""
    ids = list(token_ids[:limit])
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [window for window in windows if len(window) > 1]


def perplexity(optimised: Array, baseline: Array, reference: Array, dtype: torch.dtype) -> Perplexity:
    """From the three models' token losses."""
    return Perplexity(
        tokens=len(baseline),
        baseline=float(np.exp(baseline.mean())),
        optimised=float(np.exp(optimised.mean())),
        error=error_ratio(optimised, baseline, reference, dtype),
    )


def reference_losses(reference: Any, windows: Sequence[Sequence[int]]) -> Array:
    """Token losses of the float64 reference."""
    with exact(reference):
        return token_losses(reference, windows)


@torch.no_grad()
def greedy(
    model: Any, batch: Batch, *, max_new_tokens: int, eos_token_ids: Sequence[int], pad_token_id: int
) -> list[list[int]]:
    """What ``generate`` adds to the left-padded prompts, up to and including end-of-sequence."""
    device = next(model.parameters()).device
    out = model.generate(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
    )
    rows = out[:, batch.input_ids.shape[1] :].tolist()
    return [_until_end(row, eos_token_ids) for row in rows]


def _until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    first = next((i for i, token in enumerate(row) if token in ends), None)
    return row if first is None else row[: first + 1]


def explain_divergences(
    optimised: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    batch: Batch,
    baseline: Any,
    reference: Any,
) -> list[Divergence]:
    """Where the greedy continuations of ``batch`` part, with what baseline and reference knew there."""
    if [list(row) for row in optimised] == [list(row) for row in expected]:
        return []
    steps = max(map(len, (*optimised, *expected)))
    # What follows a row's end is the same filler in both, so that it never counts as a divergence.
    ours, theirs = (np.array([[*row, *[0] * (steps - len(row))] for row in rows]) for rows in (optimised, expected))
    baseline_trace = teacher_forcing.run(baseline, batch, decode_steps=steps, forced=theirs, hidden=False)
    reference_trace = teacher_forcing.run_reference(reference, batch, theirs)
    return divergences(ours, baseline_trace, reference_trace)
