"""A model shared by ranks, held against the stock model: the same weights, batches and rule as for one card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from qwen2_npu import Optimizations
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import stock, teacher_forcing
from qwen2_npu.conformance.accuracy.compare import Comparison, compare_traces
from qwen2_npu.conformance.accuracy.configs import random_state_dict, small_config
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.parallel.collectives import Ranks
from tests.accuracy import quantised
from tests.accuracy.pairs import TINY
from tests.unit.parallel.virtual import Run, sharded

DECODE_STEPS = 4

Alter = Callable[[Any], Any]
"""What is done to a rank's new model; gives the model to run."""


@dataclass(frozen=True)
class Shared:
    """The weights, and the stock model of them in its dtype and in float64."""

    pair: ModelPair
    config: Any
    state: dict[str, torch.Tensor]

    def build(self, ranks: Ranks, optimizations: Optimizations, device: str = "cpu") -> Any:
        """One rank's part."""
        return sharded(self.config, self.state, ranks, optimizations, dtype=self.pair.dtype, device=device)

    def trace(
        self,
        ranks: Ranks,
        optimizations: Optimizations,
        shape: str,
        alter: Alter = lambda model: model,
        device: str = "cpu",
    ) -> teacher_forcing.Trace:
        """One rank's trace. Call :meth:`ModelPair.traces` before, outside of any rank: they share its models."""
        model = alter(self.build(ranks, optimizations, device))
        forced = self.pair.traces(shape, self.pair.rounds(model))[0].forced
        # Hidden states are never computed by a graph: a fault that only they show is not one that a graph shows.
        return teacher_forcing.run(
            model,
            self.pair.batch(shape),
            decode_steps=forced.shape[1],
            forced=forced,
            hidden=not model.compiled_steps,
            last_token=optimizations.last_token_logits,
        )

    def compare(
        self, run: Run, optimizations: Optimizations, shape: str, alter: Alter = lambda model: model
    ) -> Comparison:
        """What all ranks compute together, against the stock model at every position."""
        baseline, reference = self.pair.traces(shape, self.pair.rounding is not None and optimizations.w8a8)
        traces = run(lambda ranks: self.trace(ranks, optimizations, shape, alter))
        for trace in traces[1:]:
            same = np.array_equal(trace.prefill_logits[trace.valid], traces[0].prefill_logits[trace.valid])
            assert same, "ranks that have other logits choose other tokens"
            assert np.array_equal(trace.decode_logits, traces[0].decode_logits)
        return compare_traces(traces[0], baseline, reference, self.pair.dtype, pooled=bool(self.pair.scheme))


@cache
def shared_in_8_bits(weights: str, scheme: str, dtype: str, ranks: int) -> Shared:
    """Random weights of a small shape, in 8 bits.

    Args:
        ranks: how many the stock side rounds activations as.
    """
    parsed = getattr(torch, dtype)
    config = small_config(weights)
    given = quantised.weights_of(weights, config, random_state_dict(config, dtype=parsed), scheme, parsed, "cpu", ranks)
    return Shared(
        ModelPair.of(given, "cpu", DECODE_STEPS),
        *quantised.in_8_bits(config, random_state_dict(config, dtype=parsed), scheme),
    )


@cache
def shared(weights: str, dtype: str, vocab_size: int = 512) -> Shared:
    """Weights by their name in the accuracy suite, on the CPU."""
    parsed = getattr(torch, dtype)
    if weights == TINY:
        source = open_checkpoint(tiny.path())
        pair = ModelPair.of_checkpoint(dtype=dtype, decode_steps=DECODE_STEPS)
        return Shared(pair, source.config, {name: tensor.to(parsed) for name, tensor in source.tensors()})
    config = small_config(weights, vocab_size=vocab_size)
    state = random_state_dict(config, dtype=parsed)
    baseline = stock.stock_from_state_dict(config, state, dtype=parsed)
    pair = ModelPair(
        name=f"random {weights}",
        dtype=parsed,
        config=config,
        baseline=baseline,
        reference=stock.exact_reference(baseline),
        build=lambda optimizations: sharded(config, state, Ranks(), optimizations, dtype=parsed),
        decode_steps=DECODE_STEPS,
    )
    return Shared(pair, config, state)
