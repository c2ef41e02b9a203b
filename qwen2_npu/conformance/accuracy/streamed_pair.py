"""The stock model and its float64 self layer by layer, beside this project's model: for checkpoints of any size.

Same batches, same rules, same explanations as of the whole pair. One thing differs: who chooses the tokens that are
forced on everyone in decode. Known tokens are what lets layers and passes change places (``layer_by_layer``), so the
stock model cannot choose them; and the optimised model must not choose its own questions. They are those that follow
the prompts in the held-out text (random ones after random prompts), whatever any model says. The rules do not depend on
where tokens come from: at every position, with the same tokens before it, the two models' logits are compared, and the
noise there is the stock model's own error against float64 on those tokens.

Greedy text is what the optimised model generates. It is then forced on the stock model: as long as they agree, that is
what the stock model would have generated, so the first position where its choice is another one is where the two texts
part, with the same logits as if it had run by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from qwen2_npu import emulator
from qwen2_npu.checkpoint.configuration import read_generation_config
from qwen2_npu.conformance.accuracy import locate_error, text
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES, Batch, random_continuation, text_continuation
from qwen2_npu.conformance.accuracy.channels import LayerOfBoth
from qwen2_npu.conformance.accuracy.layer_by_layer import (
    Feed,
    LayerAnswer,
    LayerByLayer,
    at_once,
    layer_parameters,
    step_by_step,
)
from qwen2_npu.conformance.accuracy.locate_error import Divergence, ErrorLocation, divergences
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.noise import Array
from qwen2_npu.conformance.accuracy.orders import rank_count, ranks_of_host
from qwen2_npu.conformance.accuracy.pair import (
    DECODE_STEPS,
    Pair,
    PairWeights,
    weights_of_checkpoint,
)
from qwen2_npu.conformance.accuracy.routing import Choices
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace, reference_trace
from qwen2_npu.conformance.machine.memory import free_bytes
from qwen2_npu.parallel.sharding import Shard

ASKED_FOR = "asked for"


@dataclass(kw_only=True)
class StreamedPair(Pair):
    """See the module's text and ``Pair``.

    The first question reads all weights once, and answers it for all batches and the held-out text; the first one with
    8-bit activations, each greedy text and each explanation of a failure read them once more.

    Attributes:
        reason: why layer by layer, in words.
    """

    models: LayerByLayer
    reason: str = ASKED_FOR
    _traces: dict[tuple[str, bool], tuple[Trace, Trace]] = field(default_factory=dict)
    _losses: dict[bool, tuple[Array, Array, list[Array]]] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: PairWeights, device: str, decode_steps: int, reason: str = ASKED_FOR) -> StreamedPair:
        """Both stock models of ``weights``, of which nothing is read yet.

        Raises:
            MemoryError: not even one layer fits.
        """
        source, config, folder = weights.source, weights.source.config, weights.folder
        _check_fits(config, weights.dtype)
        found = None if folder is None else read_generation_config(folder, config.vocab_size)
        return cls(
            name=weights.name,
            dtype=weights.dtype,
            config=config,
            generation_config=found or GenerationConfig.from_model_config(config),
            build=weights.build,
            tokenizer=weights.tokenizer,
            decode_steps=decode_steps,
            scheme=weights.scheme,
            rounding=weights.rounding,
            ranks=weights.ranks,
            models=LayerByLayer(source, weights.dtype, device, str(folder or weights.name), weights.rounding),
            reason=reason,
        )

    @property
    def reference_dtype(self) -> torch.dtype:
        return torch.float64

    def traces(self, shape: str, rounded: bool = False) -> tuple[Trace, Trace]:
        if (shape, rounded) not in self._traces:
            self._read_once(rounded)
        return self._traces[shape, rounded]

    def losses(self, windows: Sequence[Sequence[int]], rounded: bool = False) -> tuple[Array, Array, list[Array]]:
        if rounded not in self._losses:
            self._read_once(rounded)
        assert [list(window) for window in windows] == self.windows(), "other text than the held-out one was not read"
        return self._losses[rounded]

    def locate(self, model: Any, shape: str) -> ErrorLocation | None:
        batch, rounded = self.batch(shape), self.rounds(model)
        trace = self.traces(shape, rounded)[0]
        forced, chosen = trace.forced, trace.chosen
        forcing = {} if chosen is None else {"chosen": chosen}
        ours = self.ask(locate_error.captures, model, batch=batch, forced=forced, **forcing)
        first: ErrorLocation | None = None
        steps = len(ours)  # a later layer matters only in the forward passes before the first one with an error
        for layer, stock, true in self.models.points(step_by_step(batch, forced), chosen, rounded):
            for step in range(steps):
                points = [point for point in ours[step].points if point.layer == layer]
                found = locate_error.first_beyond(points, stock[step], true[step], self.dtype, step)
                if found is not None:
                    first, steps = found, step
                    break
            if not steps:
                break
        return first

    def layers(self, rounded: bool) -> Iterator[LayerOfBoth]:
        for index in range(self.config.num_hidden_layers):
            stock, true = self.models.layer(index)
            rounding = self.rounding if rounded else None
            yield LayerOfBoth(index, stock, true, 0, self.config, rounding, self.ranks)

    def stock_texts(
        self, batch: Batch, got: Sequence[Sequence[int]], max_new_tokens: int, rounded: bool = False
    ) -> tuple[list[list[int]], list[Divergence], tuple[Trace, Trace]]:
        length = max(map(len, got))
        chosen = np.array([[*row, *[0] * (length - len(row))] for row in got])
        baseline, reference = self._forced([(batch, chosen)], rounded=rounded)[0]
        preferred = np.concatenate((baseline.prefill_logits[:, -1:], baseline.decode_logits[:, :-1]), 1).argmax(-1)
        ended = np.arange(length) >= np.array([[len(row)] for row in got])
        expected = np.where(ended, chosen, preferred)
        found = divergences(chosen, replace(baseline, forced=expected), reference, self.dtype, bool(self.scheme))
        parted = {divergence.row: divergence.position for divergence in found}
        # Beyond where they part the stock model's own text is not known: it was not asked with those tokens before.
        texts = [expected[row, : parted.get(row, len(tokens) - 1) + 1].tolist() for row, tokens in enumerate(got)]
        return texts, found, (baseline, reference)

    # ---- readings of all the weights --------------------------------------------------------------------------------
    def _read_once(self, rounded: bool) -> None:
        """What does not depend on the optimised model: all batches, and the held-out text."""
        windows = self.windows()
        todo = [(self.batch(shape), self._continuation(shape)) for shape in BATCH_SHAPES]
        found = self._forced(todo, windows, rounded)
        for shape, (baseline, reference) in zip(BATCH_SHAPES, found, strict=True):
            self.check_finite_logits(baseline)
            self._traces[shape, rounded] = baseline, reference

    def _forced(
        self, todo: Sequence[tuple[Batch, Array]], windows: Sequence[Sequence[int]] = (), rounded: bool = False
    ) -> list[tuple[Trace, Trace]]:
        """The traces of both models over batches and the tokens forced after them; and the losses of ``windows``."""
        texts = [
            Feed(at_once(Batch.of([window]), np.empty((1, 0), np.int64)), keep=partial(_losses_of, window))
            for window in windows
        ]
        stock, true = self.models.run(
            [*(Feed(step_by_step(batch, forced)) for batch, forced in todo), *texts],
            [*(Feed(at_once(batch, forced)) for batch, forced in todo), *texts],
            rounded,
        )
        if windows:
            served = [passes[0].choices for passes in stock[len(todo) :]]
            chosen = [choices.wanted for choices in served if choices is not None]
            self._losses[rounded] = _joined(stock[len(todo) :]), _joined(true[len(todo) :]), chosen
        return [
            (
                _stock_trace(batch, forced, ours),
                reference_trace(batch, forced, exact.logits, exact.hidden, exact.choices),
            )
            for (batch, forced), ours, (exact,) in zip(todo, stock, true, strict=False)
        ]

    def _continuation(self, shape: str) -> Array:
        """The tokens that are forced after the prompts of a batch."""
        ids = self.heldout_ids()
        if ids:
            return text_continuation(shape, ids, self.decode_steps)
        return random_continuation(shape, self.config.vocab_size, self.decode_steps)


def _stock_trace(batch: Batch, forced: Array, answers: Sequence[LayerAnswer]) -> Trace:
    prompt, *steps = answers
    empty = np.empty((len(forced), 0, prompt.logits.shape[-1]), np.float32)
    routing: dict[str, Choices] = {}
    if prompt.choices is not None:
        routing["prefill"] = prompt.choices
    if prompt.choices is not None and steps:
        routing["decode"] = Choices.joined([step.choices for step in steps if step.choices is not None])
    return Trace(
        prefill_logits=prompt.logits,
        decode_logits=np.concatenate([empty, *(step.logits for step in steps)], axis=1),
        forced=forced,
        valid=batch.attention_mask.bool().numpy(),
        hidden=prompt.hidden,
        routing=routing,
        chosen=np.concatenate([each.wanted for each in routing.values()], axis=2) if routing else None,
    )


def _losses_of(window: Sequence[int], logits: Array) -> Array:
    return text.losses_of(logits[0, :-1], window)


def _joined(answers: Sequence[Sequence[LayerAnswer]]) -> Array:
    return np.concatenate([each.logits for passes in answers for each in passes])


# ---- which of the two pairs -----------------------------------------------------------------------------------------
def pair_of_checkpoint(
    path: Path | str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    decode_steps: int = DECODE_STEPS,
    stream: bool | None = None,
    assume_tp: int | None = None,
) -> ModelPair | StreamedPair:
    """A checkpoint folder; None for the tiny one of the package.

    Args:
        stream: the stock models layer by layer, or whole; None for whole where that fits the free memory.
        assume_tp: for how many ranks the folder was merged, where it was and does not record it.

    Raises:
        CheckpointError: see ``ModelPair.of_checkpoint``.
        MemoryError: what does not fit, and the way out.
    """
    if stream is False:
        return ModelPair.of_checkpoint(path, dtype=dtype, device=device, decode_steps=decode_steps, assume_tp=assume_tp)
    weights = weights_of_checkpoint(path, dtype=dtype, device=device, decode_steps=decode_steps, assume_tp=assume_tp)
    reason = ASKED_FOR if stream else why_streamed(weights, device)
    if reason:
        return StreamedPair.of(weights, device, decode_steps, reason)
    return ModelPair.of_checkpoint(path, dtype=dtype, device=device, decode_steps=decode_steps, assume_tp=assume_tp)


def why_streamed(weights: PairWeights, device: str, free: Callable[[str], int | None] = free_bytes) -> str:
    """What does not fit the free memory, in words; empty where the whole models do.

    Of a model that ranks share, the parts that go into the same memory count.
    """
    shapes = weights.source.shapes()
    parameters = sum(math.prod(shape) for shape in shapes.values())
    shared = device == "cpu" or (emulator.is_active() and device.startswith("npu"))
    shard, here = Shard(0, rank_count()), ranks_of_host() if shared else 1
    part = sum(math.prod(shard.shape_of(name, shape, weights.source.config)) for name, shape in shapes.items())
    exact, both = parameters * torch.float64.itemsize, (parameters + here * part) * weights.dtype.itemsize
    needs = {"cpu": exact + both} if shared else {"cpu": exact, device: both}
    for where, needed in needs.items():
        available = free(where)
        if available is not None and needed > available:
            place = "host memory" if where == "cpu" else f"memory of {where}"
            what = {"cpu": "the stock model's float64 self"}.get(where, "the stock model beside ours")
            if shared:
                what = "the stock model, its float64 self and ours"
            return f"{what} need {_gib(needed)} of {place}, {_gib(available)} are free"
    return ""


def _check_fits(config: object, dtype: torch.dtype) -> None:
    needed = layer_parameters(config) * (torch.float64.itemsize + dtype.itemsize)
    available = free_bytes("cpu")
    if available is not None and needed > available:
        raise MemoryError(
            f"one layer of the stock model and of its float64 self needs {_gib(needed)} of host memory, "
            f"{_gib(available)} are free; use a machine with more"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
