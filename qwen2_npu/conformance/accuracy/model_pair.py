"""The stock model and its float64 self, whole and in memory, beside this project's model of the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen2_npu.conformance.accuracy import locate_error, stock, teacher_forcing, text
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.channels import LayerOfBoth
from qwen2_npu.conformance.accuracy.locate_error import Divergence, ErrorLocation
from qwen2_npu.conformance.accuracy.noise import Array
from qwen2_npu.conformance.accuracy.pair import (
    DECODE_STEPS,
    Pair,
    PairWeights,
    weights_of_checkpoint,
)
from qwen2_npu.conformance.accuracy.quantised import Dequantised, scaled_weights


@dataclass(kw_only=True)
class ModelPair(Pair):
    """See ``Pair``. The stock model chooses the tokens that are forced on everyone. Traces are kept."""

    baseline: Any
    reference: Any
    _traces: dict[tuple[str, bool], tuple[teacher_forcing.Trace, teacher_forcing.Trace]] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(
        cls,
        path: Path | str | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        decode_steps: int = DECODE_STEPS,
        assume_tp: int | None = None,
    ) -> ModelPair:
        """A checkpoint folder; None for the tiny one of the package.

        Raises:
            CheckpointError: the folder is unusable, its tokenizer does not fit it, or a weight is NaN or infinite,
                naming it.
        """
        return cls.of(
            weights_of_checkpoint(path, dtype=dtype, device=device, decode_steps=decode_steps, assume_tp=assume_tp),
            device,
            decode_steps,
        )

    @classmethod
    def of(cls, weights: PairWeights, device: str, decode_steps: int) -> ModelPair:
        """Both stock models of ``weights``.

        Raises:
            CheckpointError: a weight is NaN or infinite, naming it.
        """
        config, dtype = weights.source.config, weights.dtype
        if weights.folder is None:
            state = dict(weights.source.tensors())
            baseline = stock.stock_from_state_dict(config, state, dtype=dtype, device=device)
        elif isinstance(weights.source, Dequantised):
            whole: Any = stock.stock_from_source(weights.source, weights.folder, dtype)
            baseline = whole.to(device)
        else:
            baseline = stock.stock_from_pretrained(
                weights.folder, dtype=dtype, device=device, assume_tp=weights.assume_tp
            )
        if weights.folder is not None:
            stock.check_finite(baseline.state_dict(), str(weights.folder))
        return cls(
            name=weights.name,
            dtype=dtype,
            config=baseline.config,
            generation_config=baseline.generation_config,
            build=weights.build,
            tokenizer=weights.tokenizer,
            decode_steps=decode_steps,
            scheme=weights.scheme,
            rounding=weights.rounding,
            ranks=weights.ranks,
            baseline=baseline,
            reference=stock.exact_reference(baseline, None, scaled_weights(weights.source)),
        )

    @property
    def reference_dtype(self) -> torch.dtype:
        return self.reference.dtype

    @contextmanager
    def stock(self, rounded: bool) -> Iterator[tuple[Any, Any]]:
        """The stock model and its float64 self, with 8-bit activations where ``rounded``."""
        models = self.baseline, self.reference
        with ExitStack() as stack:
            for model in models if rounded else ():
                assert self.rounding is not None
                stack.enter_context(self.rounding.of(model))
            yield models

    def traces(self, shape: str, rounded: bool = False) -> tuple[teacher_forcing.Trace, teacher_forcing.Trace]:
        if (shape, rounded) not in self._traces:
            batch = self.batch(shape)
            with self.stock(rounded) as (baseline, reference):
                trace = teacher_forcing.run(baseline, batch, decode_steps=self.decode_steps)
                self.check_finite_logits(trace)
                true = teacher_forcing.run_reference(reference, batch, trace.forced, trace.chosen)
            self._traces[shape, rounded] = (trace, true)
        return self._traces[shape, rounded]

    def locate(self, model: Any, shape: str) -> ErrorLocation | None:
        rounded, batch = self.rounds(model), self.batch(shape)
        trace = self.traces(shape, rounded)[0]
        with self.stock(rounded) as models:
            return locate_error.locate(model, *models, batch, trace.forced, self.dtype, self.ask, trace.chosen)

    def layers(self, rounded: bool) -> Iterator[LayerOfBoth]:
        for index in range(self.config.num_hidden_layers):
            rounding = self.rounding if rounded else None
            yield LayerOfBoth(index, self.baseline, self.reference, index, self.config, rounding, self.ranks)

    def losses(self, windows: Sequence[Sequence[int]], rounded: bool = False) -> tuple[Array, Array, list[Array]]:
        with self.stock(rounded) as (baseline, reference):
            losses, chosen = text.losses_and_experts(baseline, windows)
            return losses, text.reference_losses(reference, windows, chosen or None), chosen

    def stock_texts(
        self, batch: Batch, got: Sequence[Sequence[int]], max_new_tokens: int, rounded: bool = False
    ) -> tuple[list[list[int]], list[Divergence], tuple[teacher_forcing.Trace, teacher_forcing.Trace] | None]:
        with self.stock(rounded) as (baseline, reference):
            with text.last_logits(baseline) as logits:
                expected = self.greedy(baseline, batch, max_new_tokens)
            return expected, *text.compare_texts(got, expected, batch, baseline, reference, logits, bool(self.scheme))
