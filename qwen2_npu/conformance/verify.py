"""The engine of ``qwen2-npu verify``: the whole ladder on one checkpoint, against the stock model, with everything shown.

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

from qwen2_npu import checkpoint
from qwen2_npu.conformance import teacher, text, tiny
from qwen2_npu.conformance.batches import BATCH_SHAPES, Batch, random_batch, text_batch
from qwen2_npu.conformance.compare import Comparison, Mismatch
from qwen2_npu.conformance.environment import Environment
from qwen2_npu.conformance.explain import Explanation, compare_traces, explain, trace_model
from qwen2_npu.conformance.noise import RMS_FACTOR
from qwen2_npu.conformance.stock import float64_reference, stock_from_pretrained
from qwen2_npu.errors import CheckpointError
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from qwen2_npu.optimizations import LADDER, Optimizations

SCHEMA = 1
DECODE_STEPS = 12
PERPLEXITY_TOKENS, PERPLEXITY_WINDOW = 512, 128
TEXT_TOKENS, TEXT_PROMPTS = 32, 4

Progress = Callable[[str, int, int], None]
"""Called with what comes next, how many parts are done, and how many there are."""


@dataclass(frozen=True)
class Row:
    """One step of the ladder, cumulative, over all batch shapes. ``original`` is the baseline itself."""

    step: str
    comparisons: dict[str, Comparison]
    tokens_per_second: float
    baseline_tokens_per_second: float
    explanation: str = ""

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons.values())

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
            "batches": {name: comparison.to_dict() for name, comparison in self.comparisons.items()},
        }


@dataclass(frozen=True)
class Sample:
    """One prompt continued greedily by both models."""

    prompt: str
    baseline: str
    optimised: str
    divergence: str = ""
    passed: bool = True


@dataclass(frozen=True)
class Verification:
    """Everything one run found out."""

    environment: Environment
    model: str
    dtype: str
    rows: list[Row]
    samples: list[Sample]
    perplexity: text.Perplexity | None
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
                f"perplexity: RMS error of the tokens' losses {error.optimised:.3g} exceeds {RMS_FACTOR} × noise {error.noise:.3g}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "created": self.created,
            "passed": self.passed,
            "failures": self.failures,
            "environment": asdict(self.environment),
            "model": self.model,
            "dtype": self.dtype,
            "rows": [row.to_dict() for row in self.rows],
            "samples": [asdict(sample) for sample in self.samples],
            "perplexity": None if self.perplexity is None else asdict(self.perplexity),
        }


@dataclass
class Subject:
    """A checkpoint under test: baseline, float64 reference, batches, and both models' traces of them.

    Also what ``tests/accuracy --model-path`` runs on.
    """

    path: Path
    dtype: torch.dtype
    device: str
    baseline: Any
    reference: Any
    tokenizer: Any
    batches: dict[str, Batch]
    traces: dict[str, tuple[teacher.Trace, teacher.Trace]]

    @classmethod
    def load(
        cls,
        path: Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        shapes: Sequence[str] = tuple(BATCH_SHAPES),
        decode_steps: int = DECODE_STEPS,
    ) -> Subject:
        """Load baseline and reference of the checkpoint at ``path`` (None: the tiny one) and trace the batches.

        Raises:
            CheckpointError: the folder is unusable, or a weight is NaN or infinite, naming it.
        """
        folder = Path(path) if path is not None else tiny.path()
        source = checkpoint.open_checkpoint(folder)
        parsed = checkpoint.parse_dtype(dtype) or source.stored_dtype()
        baseline = stock_from_pretrained(folder, dtype=parsed, device=device)
        check_finite(baseline.state_dict(), folder)
        tokenizer = load_tokenizer(folder)
        subject = cls(folder, parsed, device, baseline, float64_reference(baseline), tokenizer, {}, {})
        ids = subject.encode(heldout_text())
        for shape in shapes:
            if ids:
                batch = text_batch(shape, ids, pad_token_id=subject.pad_token_id)
            else:
                batch = random_batch(shape, baseline.config.vocab_size)
            subject.add(shape, batch, decode_steps)
        return subject

    def add(self, name: str, batch: Batch, decode_steps: int) -> None:
        """Trace one more batch: the baseline chooses the tokens that are forced on everyone else."""
        trace = teacher.run(self.baseline, batch, decode_steps=decode_steps)
        if not np.isfinite(trace.prefill_logits[trace.valid]).all():
            raise CheckpointError(
                f"{self.path}: the stock model itself gives NaN or infinite logits in {self.dtype}; try another --dtype"
            )
        self.batches[name] = batch
        self.traces[name] = (trace, teacher.run_reference(self.reference, batch, trace.forced))

    def build(self, optimizations: Optimizations) -> Any:
        """This project's model of the same checkpoint."""
        return Qwen2ForCausalLM.from_pretrained(
            self.path, dtype=self.dtype, device=self.device, optimizations=optimizations
        ).eval()

    def compare(self, model: Any, name: str) -> tuple[Comparison, teacher.Trace]:
        """``model`` forced through batch ``name``, and its trace."""
        baseline, reference = self.traces[name]
        trace = trace_model(model, self.batches[name], baseline)
        return compare_traces(trace, baseline, reference, self.dtype), trace

    def explain(self, optimizations: Optimizations, name: str) -> Explanation | None:
        """Why ``optimizations`` fail on batch ``name``."""
        baseline_trace, reference_trace = self.traces[name]
        return explain(
            self.build,
            optimizations,
            baseline=self.baseline,
            reference=self.reference,
            batch=self.batches[name],
            baseline_trace=baseline_trace,
            reference_trace=reference_trace,
            dtype=self.dtype,
        )

    def perplexity(self, model: Any) -> text.Perplexity | None:
        """Of the held-out text; None without a tokenizer."""
        ids = self.encode(heldout_text())
        windows = text.text_windows(ids, length=PERPLEXITY_WINDOW, limit=PERPLEXITY_TOKENS)
        if not windows:
            return None
        return text.perplexity(
            text.token_losses(model, windows),
            text.token_losses(self.baseline, windows),
            text.reference_losses(self.reference, windows),
            self.dtype,
        )

    def samples(self, model: Any, prompts: Sequence[str], *, max_new_tokens: int = TEXT_TOKENS) -> list[Sample]:
        """Greedy continuations of ``prompts``, one left-padded batch through ``generate`` of both models."""
        if self.tokenizer is None or not prompts:
            return []
        batch = Batch.of([self.encode(prompt) for prompt in prompts], pad_token_id=self.pad_token_id)
        stop = {"max_new_tokens": max_new_tokens, "eos_token_ids": self.eos_token_ids, "pad_token_id": self.pad_token_id}
        expected = text.greedy(self.baseline, batch, **stop)
        got = text.greedy(model, batch, **stop)
        found = text.explain_divergences(got, expected, batch, self.baseline, self.reference)
        by_row = {divergence.row: divergence for divergence in found}
        return [
            Sample(
                prompt=prompt,
                baseline=self.tokenizer.decode(expected[row], skip_special_tokens=True),
                optimised=self.tokenizer.decode(got[row], skip_special_tokens=True),
                divergence=by_row[row].describe(self.tokenizer.decode) if row in by_row else "",
                passed=row not in by_row or by_row[row].excused,
            )
            for row, prompt in enumerate(prompts)
        ]

    def encode(self, content: str) -> list[int]:
        """Token ids; none without a tokenizer."""
        return [] if self.tokenizer is None else list(self.tokenizer(content)["input_ids"])

    @property
    def eos_token_ids(self) -> list[int]:
        ids = self.baseline.generation_config.eos_token_id
        ids = self.baseline.config.eos_token_id if ids is None else ids
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad_token_id(self) -> int:
        ids = (getattr(self.tokenizer, "pad_token_id", None), *self.eos_token_ids)
        return next((token for token in ids if token is not None), 0)


def verify(
    model_path: Path | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    steps: Sequence[str] = LADDER,
    progress: Progress = lambda label, done, total: None,
) -> Verification:
    """The ladder, cumulatively, on one checkpoint.

    Args:
        model_path: a Hugging Face folder; None for the tiny checkpoint of the package.
        steps: which rows to run; each includes all steps of the ladder before it.
        progress: called before each part.

    Raises:
        CheckpointError, UnsupportedError: what cannot be verified, and why.
        ValueError: an unknown step.
    """
    presets = {step: Optimizations.up_to(step) for step in steps}
    total = len(presets) + 2
    progress("stock model and float64 reference", 0, total)
    subject = Subject.load(model_path, dtype=dtype, device=device)
    baseline_rate = _rate([trace for trace, _ in subject.traces.values()])
    rows: list[Row] = []
    for done, (step, optimizations) in enumerate(presets.items(), start=1):
        progress(step, done, total)
        rows.append(_row(subject, step, optimizations, baseline_rate))
    progress("perplexity and greedy text", total - 1, total)
    model = subject.build(next(reversed(presets.values()), Optimizations.all()))
    result = Verification(
        environment=Environment.of(device),
        model=str(model_path) if model_path is not None else "tiny checkpoint of the package",
        dtype=str(subject.dtype).removeprefix("torch."),
        rows=rows,
        samples=subject.samples(model, tiny.prompts()[:: max(1, len(tiny.prompts()) // TEXT_PROMPTS)][:TEXT_PROMPTS]),
        perplexity=subject.perplexity(model),
    )
    progress("done", total, total)
    return result


def _row(subject: Subject, step: str, optimizations: Optimizations, baseline_rate: float) -> Row:
    model = subject.build(optimizations)
    results = {name: subject.compare(model, name) for name in subject.batches}
    failed = next((name for name, (comparison, _) in results.items() if not comparison.passed), None)
    explanation = ""
    if failed is not None:
        del model
        found = subject.explain(optimizations, failed)
        reason = str(found) if found is not None else "; ".join(results[failed][0].failures())
        explanation = f"{step}: batch {failed}: {reason}"
    return Row(
        step=step,
        comparisons={name: comparison for name, (comparison, _) in results.items()},
        tokens_per_second=_rate([trace for _, trace in results.values()]),
        baseline_tokens_per_second=baseline_rate,
        explanation=explanation,
    )


def _rate(traces: Sequence[teacher.Trace]) -> float:
    """Decode tokens/s over all batches together."""
    seconds = sum(trace.decode_seconds for trace in traces)
    return sum(trace.timed_tokens for trace in traces) / seconds if seconds else 0.0


def check_finite(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Refuse weights that no comparison can be made with.

    Raises:
        CheckpointError: naming the first tensor with NaN or infinite values, how many, and the way out.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise CheckpointError(
            f"{folder}: tensor {name} has {nans} NaN and {infinities} infinite of {tensor.numel()} values in {tensor.dtype}; "
            f"fetch the checkpoint again, or load it in a wider --dtype if only the cast overflows"
        )


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error


def heldout_text() -> str:
    """Text that the tiny checkpoint was not trained on; any checkpoint is measured on it."""
    return tiny.heldout_text()
