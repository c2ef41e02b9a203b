"""Perplexity of held-out text and greedy texts side by side: what a reader understands without the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qwen2_npu.compat import expert_count
from qwen2_npu.conformance.accuracy import teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.compare import PIECE, normalisers
from qwen2_npu.conformance.accuracy.compare_routing import compare_routing
from qwen2_npu.conformance.accuracy.locate_error import Divergence, divergences
from qwen2_npu.conformance.accuracy.noise import Array, ErrorRatio, error_ratio, position_noise
from qwen2_npu.conformance.accuracy.routing import watching
from qwen2_npu.conformance.accuracy.stock import exact
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace, without_compiled_steps


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


def token_losses(model: Any, windows: Sequence[Sequence[int]], chosen: Sequence[Array] | None = None) -> Array:
    """-log p of every token but the first of each window, in nats, float64, window after window.

    Args:
        chosen: per window the experts to force on a mixture, as :func:`losses_and_experts` gives them.
    """
    return losses_and_experts(model, windows, chosen)[0]


@torch.no_grad()
def losses_and_experts(
    model: Any, windows: Sequence[Sequence[int]], chosen: Sequence[Array] | None = None
) -> tuple[Array, list[Array]]:
    """:func:`token_losses`, and per window the experts that served it, (layers, 1, tokens, k): no window of a dense
    model."""
    device = next(model.parameters()).device
    losses, experts = [], []
    for number, window in enumerate(windows):
        ids = torch.tensor([list(window)], device=device)
        live = np.ones((1, len(window)), bool)
        with (
            without_compiled_steps(model),
            watching(model, live, None if chosen is None else chosen[number]) as routers,
        ):
            routers.start(0, len(window))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        losses.append(losses_of(teacher_forcing.to_numpy(logits), window))
        if routers.chosen is not None:
            experts.append(routers.chosen)
    return np.concatenate(losses), experts


def losses_of(logits: Array, window: Sequence[int]) -> Array:
    """(N - 1, V) logits after all but the last of a window's N tokens -> -log p of all but the first, in float64."""
    losses, size = np.empty(len(logits)), max(1, PIECE // logits.shape[-1])
    for start in range(0, len(logits), size):
        piece, tokens = logits[start : start + size], np.asarray(window[1 + start : 1 + start + size])
        largest, log_sum = normalisers(piece)
        chosen = piece[np.arange(len(piece)), tokens].astype(np.float64)
        losses[start : start + size] = -(chosen - largest[:, 0] - log_sum[:, 0])
    return losses


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


def reference_losses(reference: Any, windows: Sequence[Sequence[int]], chosen: Sequence[Array] | None = None) -> Array:
    """Token losses of the float64 reference."""
    with exact(reference):
        return token_losses(reference, windows, chosen)


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


@contextmanager
def last_logits(model: Any) -> Iterator[list[Array]]:
    """Within it, the logits (B, V) at the last position of every forward pass of ``model``."""
    found: list[Array] = []

    def keep(module: Any, given: Any, out: Any) -> None:
        found.append(teacher_forcing.to_numpy(out.logits[:, -1]))

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def compare_texts(
    optimised: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    batch: Batch,
    baseline: Any,
    reference: Any,
    logits: Sequence[Array] = (),
    pooled: bool = False,
) -> tuple[list[Divergence], tuple[Trace, Trace] | None]:
    """Where the greedy continuations of ``batch`` part, with what baseline and reference knew there.

    Args:
        logits: those that the baseline chose ``expected`` by, as :func:`last_logits` keeps them; computed where they
            are not given.
        pooled: the noise of a position is at least what is usual, see ``noise``.

    Returns:
        The places; and of a mixture the traces of both models over ``expected``, with their experts, None where nothing
        differs.
    """
    steps = max(map(len, (*optimised, *expected)))
    # What follows a row's end is the same filler in both, so that it never counts as a divergence.
    ours, theirs = (np.array([[*row, *[0] * (steps - len(row))] for row in rows]) for rows in (optimised, expected))
    if np.array_equal(ours, theirs):
        return [], None
    if not expert_count(baseline.config):
        return _divergences_of_dense(ours, theirs, batch, baseline, reference, logits, pooled), None
    stock = teacher_forcing.run(baseline, batch, decode_steps=steps, forced=theirs, hidden=False)
    true = teacher_forcing.run_reference(reference, batch, theirs, stock.chosen)
    return divergences(ours, stock, true, baseline.dtype), (stock, true)


def _divergences_of_dense(
    ours: Array, theirs: Array, batch: Batch, baseline: Any, reference: Any, logits: Sequence[Array], pooled: bool
) -> list[Divergence]:
    """No more passes than it takes: of the rows that part, up to there. Of all, where their noise is pooled."""
    differ = ours != theirs
    rows = np.arange(len(ours)) if pooled else np.flatnonzero(differ.any(axis=1))
    # Nothing after the last place where two texts part is asked for.
    steps = ours.shape[1] if pooled else int(differ[rows].argmax(axis=1).max()) + 1
    ours, theirs = ours[rows, :steps], theirs[:, :steps]
    if logits:
        known = np.stack(logits[:steps], axis=1)
    else:
        run = teacher_forcing.run(baseline, batch, decode_steps=steps - 1, forced=theirs[:, :-1], hidden=False)
        known = np.concatenate((run.prefill_logits[:, -1:], run.decode_logits), axis=1)
    parted, theirs, known = Batch(batch.input_ids[rows], batch.attention_mask[rows]), theirs[rows], known[rows]
    stock = Trace(known[:, :1], known[:, 1:], theirs, parted.attention_mask.bool().numpy())
    true = teacher_forcing.run_reference(reference, parted, theirs[:, :-1])
    return [
        replace(found, row=int(rows[found.row])) for found in divergences(ours, stock, true, baseline.dtype, pooled)
    ]


def excused_by_routing(
    found: Sequence[Divergence], ours: Trace, baseline: Trace, reference: Trace, dtype: torch.dtype
) -> list[Divergence]:
    """``found`` with the near-tie of a router that explains a divergence, where one does.

    It does where the optimised model, with the experts and tokens of the baseline forced on it, prefers the baseline's
    token or one that the baseline cannot tell from it, and where every other choice of experts that it would have made
    before is a near-tie.

    Args:
        ours: of the optimised model, uncompiled, forced to the experts and tokens of ``baseline``.
        dtype: of the baseline.
    """
    choices = compare_routing(ours.routing, baseline.routing, reference.routing, baseline.valid, dtype).mismatches
    lengths = baseline.valid.sum(axis=1)
    explained: list[Divergence] = []
    for each in found:
        row, step = each.row, each.position
        before = [other for other in choices if other.row == row and other.position < lengths[row] + step]
        said, stock, true = (
            trace.prefill_logits[row, -1] if step == 0 else trace.decode_logits[row, step - 1]
            for trace in (ours, baseline, reference)
        )
        margin, noise = stock[each.baseline_token] - stock[said.argmax()], position_noise(stock, true, dtype)
        if not each.excused and before and all(other.excused for other in before) and margin <= 2 * noise:
            each = replace(each, routing=str(before[0]))
        explained.append(each)
    return explained
