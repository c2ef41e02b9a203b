"""Says where a failed comparison goes wrong: the step of the ladder, the layer, the operator.

Two bisections. Steps of the ladder are switched on one after another until the comparison fails: that is the step.
Then every intermediate tensor of that model is held against the float64 reference in order of execution, by the rule
that the comparison itself uses (RMS error at most 1.5 × the baseline's own at the same point): the first beyond it is
the place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.conformance.accuracy import teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.compare import Comparison
from qwen2_npu.conformance.accuracy.intermediates import PassRecorder, Point, capturing, of_all_ranks
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, Array, ErrorRatio, error_ratio, position_noise, rms
from qwen2_npu.conformance.accuracy.routing import Routers, live_columns, watching
from qwen2_npu.conformance.accuracy.stock import exact
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.collectives import ALONE

BuildModel = Callable[[Optimizations], Any]
"""Makes the optimised model with the given switches; the weights are the caller's."""


def call(function: Callable[..., Any], model: Any, **arguments: Any) -> Any:
    """``function`` of ``model``, which is this process's alone."""
    return function(model, **arguments)


SMALL_OPERATORS: dict[str, str] = {
    "q_proj": "linear",
    "k_proj": "linear",
    "v_proj": "linear",
    "query": "rotary embedding",
    "key": "rotary embedding, cache",
    "value": "cache",
    "attention": "matmul, softmax, matmul",
    "o_proj": "linear",
    "gate_proj": "linear",
    "up_proj": "linear",
    "mlp activation": "silu, mul",
    "down_proj": "linear",
    "router": "linear",
    "routing weights": "softmax, topk",
    "shared gate": "linear",
    "shared gate_proj": "linear",
    "shared up_proj": "linear",
    "shared mlp activation": "silu, mul",
    "shared down_proj": "linear",
    "expert products": "matmul, silu, mul, matmul",
    "combination": "mul, add",
    "lm_head": "linear",
}
"""What computes a point where no npu operator ran before it."""

FEW_ERRORS: dict[str, int | None] = {
    "router": None,
    "routing weights": None,
    "shared gate": None,
    "expert products": 4,  # two experts at least, whose gate and up each err as a whole
    "combination": 3,  # as many weights at least: of two experts and of the shared one
}
"""Points of a mixture whose RMS error is a matter of chance in a pass of few tokens -> how many errors of a token are
independent of each other, None for as many as it has values that are not 0."""


@dataclass(frozen=True)
class ErrorLocation:
    """The first place where the optimised model leaves what the dtype explains."""

    path: str
    """``prefill`` or ``decode step N`` (from 0)."""
    layer: int | None
    name: str
    operators: tuple[str, ...]
    error: ErrorRatio
    heads_moved: bool = False
    """Every head is that of some head of the reference, at another place: computed rightly, and mixed up."""
    channel: int | None = None
    """The output of a product of 8-bit weights that is wrong; None where the tensor as a whole is."""
    allowed: float = RMS_FACTOR
    """How many times the noise the error may be."""

    def __str__(self) -> str:
        place = self.name if self.layer is None else f"layer {self.layer}, {self.name}"
        place = place if self.channel is None else f"{place} channel {self.channel}"
        what = ", ".join(self.operators) or SMALL_OPERATORS.get(self.name, "add, norm")
        if self.heads_moved:
            what = "heads in the wrong places: the mapping of query heads to kv heads, or a split into heads"
        return (
            f"{place} ({what}): RMS error {self.error.optimised:.3g} exceeds {self.allowed:.3g} × noise "
            f"{self.error.noise:.3g}, in {self.path}"
        )


@dataclass(frozen=True)
class Explanation:
    """``step`` None: already the model without any optimisation fails."""

    step: str | None
    optimizations: tuple[str, ...]
    finding: ErrorLocation | None
    failures: tuple[str, ...]

    def __str__(self) -> str:
        step = f"step {self.step}" if self.step else "with every optimisation off"
        if self.finding is not None:
            place = str(self.finding)
        elif self.failures[0].startswith("last_token") and all(
            failure.startswith(("last_token", "routing in last_token")) for failure in self.failures
        ):
            place = (
                "logits at every position are right, but those kept with logits_to_keep=1 are not the last token's: "
                "the index it gathers is wrong"
            )
        elif all(failure.startswith("routing") for failure in self.failures):
            place = "every intermediate tensor is right with the baseline's experts, but the router chooses others"
        else:
            place = "no intermediate tensor exceeds its bound when run eagerly: suspect the compiled graph"
        return f"{step}, {place}; {self.failures[0]}"

    def to_dict(self) -> dict[str, Any]:
        return {"message": str(self), **asdict(self)}


def explain(
    build: BuildModel,
    optimizations: Optimizations,
    *,
    compare: Callable[[Any], Comparison],
    find: Callable[[Any], ErrorLocation | None],
) -> Explanation | None:
    """Bisects the failure of ``optimizations`` on a batch: a step with which the model fails, and without which it
    does not, or the model without any step if that fails. None if, built again, nothing fails.

    Args:
        build: called once per set of steps tried, and again for the one that is explained.
        compare: holds a model against the stock model on that batch.
        find: says where a model that fails there goes wrong, as :func:`locate` does.
    """
    names = optimizations.names()
    failures: dict[int, tuple[str, ...]] = {}

    def first(count: int) -> Optimizations:
        return Optimizations.of(names[:count])  # what a switch needs stands before it

    def passes(count: int) -> bool:
        comparison = compare(build(first(count)))
        if not comparison.passed:
            failures[count] = tuple(comparison.failures())
        return bool(comparison.passed)

    right, wrong = 0, len(names)
    if passes(wrong):
        return None
    if wrong > right and not passes(right):
        wrong = right
    while wrong - right > 1:
        tried = (right + wrong) // 2
        if passes(tried):
            right = tried
        else:
            wrong = tried
    step = names[wrong - 1] if wrong else None
    return Explanation(step, first(wrong).names(), find(build(first(wrong))), failures[wrong])


def trace_model(
    model: Any,
    batch: Batch,
    baseline_trace: teacher_forcing.Trace,
    ask: Callable[..., teacher_forcing.Trace] = call,
) -> teacher_forcing.Trace:
    """The optimised model's trace, on the paths that its switches and compilation give a meaning to.

    Args:
        ask: calls a function with the model, as ``Pair.ask`` does.
    """
    arguments: dict[str, Any] = {
        "batch": batch,
        "decode_steps": baseline_trace.forced.shape[1],
        "forced": baseline_trace.forced,
        "hidden": baseline_trace.hidden is not None,
        "last_token": model.optimizations.last_token_logits,
    }
    if baseline_trace.chosen is None:
        return ask(teacher_forcing.run, model, **arguments)
    forcing = {"chosen": baseline_trace.chosen, "uncompiled": True}
    compiled = bool(getattr(model, "compiled_steps", None))
    trace = ask(teacher_forcing.run, model, **arguments, **forcing)
    if not compiled:
        return trace
    # No expert can be forced inside a graph. What the same model chooses uncompiled tells where none needs to be.
    found = ask(teacher_forcing.run, model, **arguments | {"hidden": False})
    return replace(found, hidden=trace.hidden, routing=trace.routing, chosen=trace.chosen, compiled=True)


def locate(
    optimised: Any,
    baseline: Any,
    reference: Any,
    batch: Batch,
    forced: Array,
    dtype: torch.dtype,
    ask: Callable[..., list[PassRecorder]] = call,
    chosen: Array | None = None,
) -> ErrorLocation | None:
    """The first point, in order of execution, whose error exceeds its bound; None if there is none.

    Args:
        ask: calls a function with the optimised model, as ``Pair.ask`` does.
        chosen: the experts to force on a mixture, as ``Trace.chosen`` has them.
    """
    forcing = {} if chosen is None else {"chosen": chosen}
    runs = [ask(captures, optimised, batch=batch, forced=forced, **forcing), captures(baseline, batch, forced, chosen)]
    with exact(reference):
        runs.append(captures(reference, batch, forced, chosen))
    for step, (ours, stock, true) in enumerate(zip(*runs, strict=True)):
        found = first_beyond(ours.points, stock, true, dtype, step)
        if found is not None:
            return found
    return None


def first_beyond(
    ours: Sequence[Point], stock: PassRecorder, true: PassRecorder, dtype: torch.dtype, step: int
) -> ErrorLocation | None:
    """The first of the optimised model's points whose error exceeds its bound.

    Args:
        stock, true: of the baseline and the reference in the same forward pass.
        step: which pass it is: 0 the prefill, then every decode step.
    """
    stock_points, true_points = stock.by_place(), true.by_place()
    for point in ours:
        place = (point.layer, point.name)
        if place in stock_points and place in true_points:
            error = _error(point, stock_points[place], true_points[place], dtype)
            if not error.within and not _by_chance(error, true_points[place]):
                path = "prefill" if step == 0 else f"decode step {step - 1}"
                moved = _heads_moved(point, stock_points[place], true_points[place], dtype)
                return ErrorLocation(path, point.layer, point.name, point.operators, error, moved)
    return None


def _by_chance(error: ErrorRatio, point: Point) -> bool:
    """Whether the RMS errors of so few values differ as much by chance.

    The ratio of two mean squares of n values each exceeds f with a probability of about f^(-n/2): one in a million at
    10^(12/n), which is 10^(6/n) of their roots.
    """
    if point.name not in FEW_ERRORS:
        return False
    each = FEW_ERRORS[point.name]
    count = int(np.count_nonzero(point.values)) if each is None else each * len(point.values)
    return error.ratio <= RMS_FACTOR * 10 ** (6 / max(1, count))


def _heads_moved(ours: Point, stock: Point, true: Point, dtype: torch.dtype) -> bool:
    """Whether each head of ours is within its bound of some head of the reference, and one of them not of its own."""
    if ours.values.shape != true.values.shape or not ours.heads == true.heads > 1:
        return False
    mine, baseline, exact_heads = (np.split(point.values, ours.heads, axis=1) for point in (ours, stock, true))
    fits = [
        [error_ratio(head, own, wanted, dtype).within for own, wanted in zip(baseline, exact_heads, strict=True)]
        for head in mine
    ]
    return all(any(places) for places in fits) and not all(places[own] for own, places in enumerate(fits))


def _error(ours: Point, stock: Point, true: Point, dtype: torch.dtype) -> ErrorRatio:
    if ours.values.shape != true.values.shape:
        return ErrorRatio(optimised=float("inf"), baseline=0.0, floor=0.0)
    return error_ratio(ours.values, stock.values, true.values, dtype)


@torch.no_grad()
def captures(model: Any, batch: Batch, forced: Array, chosen: Array | None = None) -> list[PassRecorder]:
    """One capture per forward pass: the prefill, then every decode step. Of a model that ranks share, the whole
    tensors: all ranks must ask.

    Args:
        chosen: the experts to force on a mixture, as ``Trace.chosen`` has them.
    """
    if getattr(model, "compiled_steps", None):
        model.compiled_steps = {}  # hooks and modes see eager execution only
    with watching(model, live_columns(batch.attention_mask, forced.shape[1]), chosen) as routers:
        return _captures(model, batch, forced, routers)


def _captures(model: Any, batch: Batch, forced: Array, routers: Routers) -> list[PassRecorder]:
    device = next(model.parameters()).device
    mask = batch.attention_mask.to(device)
    lengths = batch.lengths
    found: list[PassRecorder] = []
    cache: dict[str, Any] = teacher_forcing.preallocated(model, len(lengths), mask.shape[1] + forced.shape[1])
    tokens = batch.input_ids.to(device)
    positions = teacher_forcing.position_ids_of(mask)
    new = lengths
    for step in range(forced.shape[1] + 1):
        if step:
            tokens = torch.from_numpy(forced[:, step - 1 : step].copy()).to(device)
            mask = torch.cat((mask, mask.new_ones(len(lengths), 1)), dim=1)
            positions = (mask.sum(dim=1, keepdim=True) - 1).long()
            new = [1] * len(lengths)
        routers.start(mask.shape[1] - tokens.shape[1], mask.shape[1])
        with capturing(model, new=new, total=[length + step for length in lengths]) as capture:
            out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
        cache = {CACHE_NAME: cache_of(out)}
        found.append(capture)
    if getattr(model, "ranks", ALONE).size > 1:
        for capture in found:
            capture.points = [of_all_ranks(point, model) for point in capture.points]
    return found


@dataclass(frozen=True)
class Divergence:
    """Where two free-running greedy continuations of one row part, and what the baseline knew there."""

    row: int
    position: int
    """Tokens of the continuation that agree before it."""
    baseline_token: int
    optimised_token: int
    baseline_logits: tuple[float, float]
    """The baseline's logits of its own token and of the optimised model's."""
    noise: float
    routing: str = ""
    """Of a mixture: the near-tie of a router before this place that explains it; empty where none does."""

    @property
    def margin(self) -> float:
        return self.baseline_logits[0] - self.baseline_logits[1]

    @property
    def excused(self) -> bool:
        return self.margin <= 2 * self.noise or bool(self.routing)

    def describe(self, decode: Callable[[int], str] | None = None) -> str:
        """One line; ``decode`` turns a token id into text."""
        tokens = [
            f"{token} {decode(token)!r}" if decode else str(token)
            for token in (self.baseline_token, self.optimised_token)
        ]
        verdict = "a near-tie, within" if self.margin <= 2 * self.noise else "beyond"
        cause = f", after a near-tie of experts: {self.routing}" if self.routing else ""
        return (
            f"row {self.row} diverges after {self.position} tokens: baseline {tokens[0]} (logit "
            f"{self.baseline_logits[0]:.5g}), optimised {tokens[1]} ({self.baseline_logits[1]:.5g}); margin "
            f"{self.margin:.3g} is {verdict} 2 × noise {self.noise:.3g}{cause}"
        )


def divergences(
    chosen: Array,
    baseline: teacher_forcing.Trace,
    reference: teacher_forcing.Trace,
    dtype: torch.dtype,
    pooled: bool = False,
) -> list[Divergence]:
    """First divergence of every row whose free-running greedy tokens differ.

    Args:
        chosen: (B, T) tokens that the optimised model chose for itself.
        baseline, reference: traces forced to the tokens that the baseline chose for itself. Up to the divergence the
            contexts are the same, so their logits there say what either knew.
        dtype: of the baseline.
        pooled: the noise of a position is at least what is usual, see ``noise``.
    """
    found: list[Divergence] = []
    usual = 0.0
    if pooled:
        errors = [
            position_noise(stock, true, dtype)
            for stock, true in (
                (baseline.prefill_logits[:, -1:], reference.prefill_logits[:, -1:]),
                (baseline.decode_logits, reference.decode_logits),
            )
        ]
        usual = rms(np.concatenate(errors, axis=1))
    for row in range(baseline.forced.shape[0]):
        differ = np.flatnonzero(chosen[row] != baseline.forced[row])
        if not differ.size:
            continue
        step = int(differ[0])
        logits, true = (
            trace.prefill_logits[row, -1] if step == 0 else trace.decode_logits[row, step - 1]
            for trace in (baseline, reference)
        )
        tokens = int(baseline.forced[row, step]), int(chosen[row, step])
        found.append(
            Divergence(
                row=row,
                position=step,
                baseline_token=tokens[0],
                optimised_token=tokens[1],
                baseline_logits=(float(logits[tokens[0]]), float(logits[tokens[1]])),
                noise=max(float(position_noise(logits, true, dtype)), usual),
            )
        )
    return found
