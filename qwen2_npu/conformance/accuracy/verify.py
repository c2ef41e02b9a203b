"""The engine of ``qwen2-npu verify``: the whole ladder on one checkpoint, against the stock model, with everything
shown.

Nothing here prints. Progress is reported through a callback; the result is a :class:`Verification`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.sources import open_checkpoint, parse_dtype
from qwen2_npu.compat import expert_count
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.conformance.accuracy.compare import Comparison, Mismatch
from qwen2_npu.conformance.accuracy.compare_routing import RoutingComparison
from qwen2_npu.conformance.accuracy.locate_error import BuildModel
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR
from qwen2_npu.conformance.accuracy.orders import END, Orders, follow, rank_count
from qwen2_npu.conformance.accuracy.pair import DECODE_STEPS, GreedyText, Pair, weights_of_checkpoint
from qwen2_npu.conformance.accuracy.quantising_cost import QuantisingCost, comparable, measure
from qwen2_npu.conformance.accuracy.streamed_pair import StreamedPair, pair_of_checkpoint
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace
from qwen2_npu.conformance.machine.environment import Environment
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph import check_mode, compile_model
from qwen2_npu.optimizations import EXPERTS, LADDER, PARALLEL, QUANTIZED, Optimizations
from qwen2_npu.parallel.collectives import FUSED_SIZES

SCHEMA = 1
SAMPLE_PROMPTS = 4

Progress = Callable[[str, int, int], None]
"""Called with what comes next, how many parts are done, and how many there are."""


@dataclass(frozen=True)
class StepResult:
    """One step of the ladder, cumulative, over all batch shapes."""

    step: str
    comparisons: dict[str, Comparison]
    tokens_per_second: float
    baseline_tokens_per_second: float | None
    """None where the stock model went layer by layer: that has no speed to compare with."""
    explanation: str = ""

    @property
    def passed(self) -> bool:
        return not self.explanation and all(comparison.passed for comparison in self.comparisons.values())

    @property
    def positions(self) -> int:
        return sum(comparison.positions for comparison in self.comparisons.values())

    @property
    def agreement(self) -> float:
        agreements = sum(comparison.agreements for comparison in self.comparisons.values())
        return agreements / self.positions if self.positions else 0.0

    @property
    def excused(self) -> tuple[Mismatch, ...]:
        return tuple(mismatch for comparison in self.comparisons.values() for mismatch in comparison.excused)

    @property
    def routing(self) -> tuple[RoutingComparison, ...]:
        """Of a mixture of experts: that of each batch shape."""
        return tuple(c.routing for c in self.comparisons.values() if c.routing is not None)

    @property
    def max_logit_error(self) -> float:
        return max(comparison.max_logit_error for comparison in self.comparisons.values())

    @property
    def kl(self) -> float:
        """Mean over the positions, in nats."""
        return sum(c.kl_mean * c.positions for c in self.comparisons.values()) / max(self.positions, 1)

    @property
    def rms_ratio(self) -> float:
        ratios = [comparison.rms_ratio for comparison in self.comparisons.values()]
        return float("nan") if any(np.isnan(ratios)) else max(ratios)

    @property
    def experts(self) -> dict[str, int]:
        """Of a mixture: choices of experts, how many are the baseline's, how many of the others are excused, and the
        positions that compiled steps leave out. Empty of a dense model."""
        if not self.routing:
            return {}
        return {
            "choices": sum(each.choices for each in self.routing),
            "agreements": sum(each.agreements for each in self.routing),
            "excused": sum(len(each.excused) for each in self.routing),
            "left_out": sum(sum(each.left_out.values()) for each in self.routing),
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "passed": self.passed,
            "positions": self.positions,
            "agreement": self.agreement,
            "excused": len(self.excused),
            "max_logit_error": self.max_logit_error,
            "kl": self.kl,
            "rms_ratio": self.rms_ratio,
            "tokens_per_second": self.tokens_per_second,
            "baseline_tokens_per_second": self.baseline_tokens_per_second,
            "explanation": self.explanation,
            **({"experts": self.experts} if self.experts else {}),
            "batches": {name: comparison.to_dict() for name, comparison in self.comparisons.items()},
        }


@dataclass(frozen=True)
class Verification:
    """Everything one run found out."""

    environment: Environment
    model: str
    dtype: str
    reference_dtype: str
    rows: list[StepResult]
    samples: list[GreedyText]
    perplexity: text.Perplexity | None
    mode: str = "eager"
    streamed: str = ""
    """Why the stock model went layer by layer; empty if it was whole."""
    ranks: int = 1
    """How many shared the optimised model."""
    left_out: str = ""
    """Which steps were not run that by default would be, and why; empty if all were, or some were asked for."""
    scheme: str = ""
    """Of a checkpoint with 8-bit weights."""
    cost: QuantisingCost | None = None
    """What the 8 bits cost, where a checkpoint in floating point was given to tell it."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.failures

    @property
    def failures(self) -> list[str]:
        found = [row.explanation for row in self.rows if not row.passed]
        found += [sample.divergence for sample in self.samples if not sample.passed]
        if self.perplexity is not None and not self.perplexity.passed:
            error = self.perplexity.error
            found.append(
                f"perplexity: RMS error of the tokens' losses {error.optimised:.3g} exceeds {RMS_FACTOR} × noise "
                f"{error.noise:.3g}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "created": self.created,
            "passed": self.passed,
            "failures": self.failures,
            "environment": self.environment.to_json(),
            "model": self.model,
            "dtype": self.dtype,
            "mode": self.mode,
            "reference_dtype": self.reference_dtype,
            "streamed": self.streamed,
            **({"ranks": self.ranks} if self.ranks > 1 else {}),
            **({"left_out": self.left_out} if self.ranks > 1 or self.left_out else {}),
            **({"scheme": self.scheme} if self.scheme else {}),
            "rows": [row.to_dict() for row in self.rows],
            "samples": [asdict(sample) for sample in self.samples],
            "perplexity": None if self.perplexity is None else asdict(self.perplexity),
            **({} if self.cost is None else {"cost": asdict(self.cost)}),
        }


def verify(
    model_path: Path | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    steps: Sequence[str] | None = None,
    mode: str = "eager",
    stream: bool | None = None,
    assume_tp: int | None = None,
    against: Path | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Verification:
    """The ladder, cumulatively, on one checkpoint. Of several ranks the first calls it, and the others
    :func:`take_part`.

    Args:
        model_path: a Hugging Face folder; None for the tiny checkpoint of the package.
        steps: which rows to run; each includes all steps of the ladder before it. None for the ladder, and what only
            a mixture of experts, several ranks and 8-bit weights have; of a mixture that is compiled, what graphs can
            hold.
        mode: how the optimised model is compiled, see ``compile_model``.
        stream: the stock model and its float64 self layer by layer, or whole; None for whole where that fits the free
            memory.
        assume_tp: for how many ranks the folder was merged, where it was and does not record it.
        against: the checkpoint in floating point that one with 8-bit weights was made of, to tell what they cost.
        progress: called before each part, and before each layer of one that goes layer by layer.

    Raises:
        CheckpointError, UnsupportedError: what cannot be verified, and why.
        MemoryError: what does not fit, and the way out.
        ValueError: an unknown step.
    """
    orders = Orders.of_ranks()
    steps, left_out = _steps(steps, model_path, device, dtype, assume_tp, mode)
    presets = {step: Optimizations.up_to(step) for step in steps}
    for optimizations in presets.values():
        check_mode(mode, torch.device(device), optimizations)
    compared = None if against is None else comparable(model_path, against, parse_dtype(dtype))
    total = len(presets) + 2 + (compared is not None)
    part, done = "stock model and float64 reference", 0
    progress(part, done, total)
    pair = pair_of_checkpoint(model_path, dtype=dtype, device=device, stream=stream, assume_tp=assume_tp)
    streamed = ""
    if isinstance(pair, StreamedPair):
        streamed = pair.reason
        progress(f"stock model layer by layer: {streamed}", done, total)
        pair.models.progress = lambda layer: progress(f"{part}, {layer}", done, total)
    if orders is not None:
        pair.lead(orders)
    eager = pair.build
    if mode != "eager":
        pair.build = lambda optimizations: pair.ask(compile_model, eager(optimizations), mode=mode)
    baseline_rate = _rate([pair.traces(shape)[0] for shape in BATCH_SHAPES]) or None
    rows: list[StepResult] = []
    model: Any = None
    for done, (part, optimizations) in enumerate(presets.items(), start=1):
        progress(part, done, total)
        model = None  # there is memory for one
        row, model = _row(pair, part, optimizations, baseline_rate, eager)
        rows.append(row)
    part, done = "perplexity and greedy text", len(presets) + 1
    progress(part, done, total)
    if model is None:
        model = pair.build(next(reversed(presets.values()), Optimizations.all()))
    prompts = tiny.prompts()
    samples = pair.samples(model, prompts[:: max(1, len(prompts) // SAMPLE_PROMPTS)][:SAMPLE_PROMPTS])
    perplexity = pair.perplexity(model)
    cost = None
    if compared is not None:
        model, part, done = None, "what 8 bits cost", total - 1
        progress(part, done, total)
        cost = measure(compared, device, lambda layer: progress(f"{part}, {layer}", done, total))
    result = Verification(
        environment=Environment.of(device),
        model=pair.name,
        dtype=str(pair.dtype).removeprefix("torch."),
        reference_dtype=str(pair.reference_dtype).removeprefix("torch."),
        rows=rows,
        samples=samples,
        perplexity=perplexity,
        mode=mode,
        streamed=streamed,
        ranks=rank_count(),
        left_out=left_out,
        scheme=pair.scheme,
        cost=cost,
    )
    if orders is not None:
        orders.tell(END, passed=result.passed)
    progress("done", total, total)
    return result


def take_part(
    model_path: Path | None = None, *, device: str = "cpu", dtype: str = "auto", assume_tp: int | None = None
) -> bool:
    """What ranks other than the first do while that one calls :func:`verify` with the same arguments.

    Returns:
        Whether all passed, as the first rank found.

    Raises:
        CheckpointError: as of :func:`verify`.
    """
    orders = Orders.of_ranks()
    assert orders is not None, "there are no other ranks here"
    weights = weights_of_checkpoint(
        model_path, dtype=dtype, device=device, decode_steps=DECODE_STEPS, assume_tp=assume_tp
    )
    return follow(orders, weights.build)


def _steps(
    asked: Sequence[str] | None,
    model_path: Path | None,
    device: str,
    dtype: str,
    assume_tp: int | None = None,
    mode: str = "eager",
) -> tuple[Sequence[str], str]:
    """The rows to run, and why not all are that there are.

    Args:
        asked: None for all.

    Raises:
        UnsupportedError: a step was asked for that this model or these ranks cannot have.
    """
    missing, way_out, ranks = "", "", rank_count()
    source = open_checkpoint(model_path or tiny.path(), assume_tp=assume_tp)
    mixture = expert_count(source.config) > 0
    if asked is not None and not mixture and set(asked) & set(EXPERTS):
        where = "the tiny checkpoint" if model_path is None else model_path
        raise UnsupportedError(
            f"--steps {','.join(asked)}: {', '.join(EXPERTS)} is a step of a mixture of experts, and {where} is none; "
            "leave it out"
        )
    if mixture and mode != "eager" and set(asked or ()) & set(LADDER):
        raise UnsupportedError(
            f"--steps {','.join(asked or ())} --mode {mode}: without {EXPERTS[0]} the host looks up which experts the "
            f"tokens go to, which no graph can; take --steps {EXPERTS[0]}, or --mode eager"
        )
    scheme, why_float = _scheme(asked, source, dtype, mixture)
    if ranks not in FUSED_SIZES:
        sizes = ", ".join(map(str, FUSED_SIZES))
        missing = f"mm_all_reduce takes {sizes} ranks, and there {'is 1' if ranks == 1 else f'are {ranks}'}"
        way_out = "leave it out, or start as many (docs/parallel.md)"
    elif device.startswith("npu") and (asked is None or set(asked) & set(PARALLEL)):
        stored = parse_dtype(dtype) or source.stored_dtype()
        missing = "mm_all_reduce takes no float32 on an NPU" if stored == torch.float32 else ""
        way_out = "leave it out, or take --dtype bfloat16"
    if asked is None:
        ladder = LADDER if not mixture else (*LADDER, *EXPERTS) if mode == "eager" else EXPERTS
        parallel = () if missing else PARALLEL
        reasons = [missing] if missing and ranks > 1 else []
        return (*ladder, *parallel, *scheme), "; ".join([*reasons, *why_float])
    if missing and set(asked) & set(PARALLEL):
        raise UnsupportedError(f"--steps {','.join(asked)}: {missing}; {way_out}")
    return asked, ""


def _scheme(asked: Sequence[str] | None, source: Any, dtype: str, mixture: bool) -> tuple[list[str], list[str]]:
    """The step of the checkpoint's 8-bit weights, and why it is not run: none of a checkpoint in floating point.

    Raises:
        UnsupportedError: one that was asked for and cannot be had.
    """
    found = quantization_of(source.config)
    computed = parse_dtype(dtype) or source.stored_dtype()
    too_rare = (
        "w8a8 is not compared in float32, where steps of 8-bit activations are too rare to be measured and too large "
        "for rounding (docs/accuracy.md)"
    )
    for step in [step for step in asked or () if step in QUANTIZED]:
        try:
            Optimizations.for_model(Optimizations.up_to(step), source.config, found.scheme if found else None)
        except UnsupportedError as error:
            raise UnsupportedError(f"--steps {','.join(asked or ())}: {error}") from None
        if step == "w8a8" and computed == torch.float32:
            raise UnsupportedError(f"--steps {','.join(asked or ())}: {too_rare}; take --dtype bfloat16 or float16")
    if found is None:
        return [], []
    if mixture:
        return [], [f"{found.scheme} is of no mixture of experts: its weights are dequantised while they are read"]
    if found.scheme == "w8a8" and computed == torch.float32:
        return ["w8a16"], [f"{too_rare}; with --dtype bfloat16 or float16 it is"]
    return [found.scheme], []


def _row(
    pair: Pair, step: str, optimizations: Optimizations, baseline_rate: float | None, eager: BuildModel
) -> tuple[StepResult, Any]:
    """What one step comes to, and its model; None in place of that where others were built to explain a failure.

    Args:
        eager: builds the model uncompiled, whose layers and operators can be followed.
    """
    model = pair.build(optimizations)
    results = {shape: pair.compare(model, shape) for shape in BATCH_SHAPES}
    failed = next((shape for shape, (comparison, _) in results.items() if not comparison.passed), None)
    explanation = ""
    if failed is not None:
        model = None
        reason = pair.explain(optimizations, failed, build=eager) or "; ".join(results[failed][0].failures())
        explanation = f"{step}: batch {failed}: {reason}"
    elif optimizations.scheme is not None:
        if eager is not pair.build:  # operators are followed in an uncompiled model
            model = None  # there is memory for one
        wrong = pair.wrong_channel(model or eager(optimizations))
        explanation = "" if wrong is None else f"{step}: {wrong}"
    row = StepResult(
        step=step,
        comparisons={shape: comparison for shape, (comparison, _) in results.items()},
        tokens_per_second=_rate([trace for _, trace in results.values()]),
        baseline_tokens_per_second=baseline_rate,
        explanation=explanation,
    )
    return row, model


def _rate(traces: Sequence[Trace]) -> float:
    """Decode tokens/s over all batches together."""
    seconds = sum(trace.decode_seconds for trace in traces)
    return sum(trace.timed_tokens for trace in traces) / seconds if seconds else 0.0
