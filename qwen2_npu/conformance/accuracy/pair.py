"""A set of weights under test, and the questions that ``verify`` and the accuracy suite ask about it.

They are the same whether the weights are random or of a checkpoint, and whether the stock model and its float64 self
are in memory (``model_pair``) or pass through it layer by layer (``streamed_pair``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from qwen2_npu.checkpoint.configuration import read_generation_config
from qwen2_npu.checkpoint.sources import NamedSource, StateDictSource, open_checkpoint, parse_dtype
from qwen2_npu.checkpoint.tokenizer import load_tokenizer
from qwen2_npu.checkpoint.weights import skeleton
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import channels, locate_error, teacher_forcing, text
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES, Batch, random_batch, text_batch
from qwen2_npu.conformance.accuracy.compare import Comparison, KnownPath, compare_traces
from qwen2_npu.conformance.accuracy.configs import random_state_dict, small_config
from qwen2_npu.conformance.accuracy.locate_error import BuildModel, Divergence, ErrorLocation, Explanation
from qwen2_npu.conformance.accuracy.noise import Array
from qwen2_npu.conformance.accuracy.orders import Orders, rank_count
from qwen2_npu.conformance.accuracy.quantised import InputRounding, as_meant
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace
from qwen2_npu.errors import CheckpointError
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.sharding import Shard

DECODE_STEPS = 12
PERPLEXITY_TOKENS, PERPLEXITY_WINDOW = 512, 128
SAMPLE_TOKENS = 32

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class GreedyText:
    """One prompt continued greedily by both models. ``divergence``: what happened where they part, empty if nowhere."""

    prompt: str
    baseline: str
    optimised: str
    divergence: str = ""
    passed: bool = True


@dataclass(kw_only=True)
class Pair(ABC):
    """See the module's text. Batches are made on first use and kept.

    Attributes:
        config, generation_config: of the stock model.
        build: this project's model of the same weights, with the given switches.
        orders: to the other ranks that share that model; None where it is this process's alone.
        scheme: that of 8-bit weights; empty of ordinary ones.
        rounding: what a model that computes with 8-bit activations does to them; None where there is none.
        ranks: how many share this project's model.
    """

    name: str
    dtype: torch.dtype
    config: Any
    generation_config: Any = None
    build: BuildModel
    tokenizer: Any = None
    decode_steps: int = DECODE_STEPS
    orders: Orders | None = None
    scheme: str = ""
    rounding: InputRounding | None = None
    ranks: int = 1
    _batches: dict[str, Batch] = field(default_factory=dict)
    _known: dict[tuple[str, bool], dict[str, KnownPath]] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def of(cls, weights: PairWeights, device: str, decode_steps: int) -> Self:
        """The pair of ``weights``."""

    @classmethod
    def of_shape(
        cls,
        shape: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        decode_steps: int = DECODE_STEPS,
        seed: int = 0,
    ) -> Self:
        """Random weights in the small version of a member of the family: see ``accuracy.configs``."""
        return cls.of(weights_of_shape(shape, dtype=dtype, device=device, seed=seed), device, decode_steps)

    # ---- this project's model ---------------------------------------------------------------------------------------
    def lead(self, orders: Orders) -> None:
        """Compare the model that the ranks of ``orders`` share: they are told of every call of it."""
        self.orders, self.build = orders, orders.leading(self.build)

    def ask(self, function: Callable[..., ResultT], model: Any, **arguments: Any) -> ResultT:
        """``function`` of the optimised model, which was built last, on all ranks that share it.

        Args:
            function: one of ``orders.CALLS``.
        """
        if self.orders is not None:
            self.orders.tell(function.__name__, **arguments)
        return function(model, **arguments)

    def rounds(self, model: Any) -> bool:
        """Whether ``model`` computes with 8-bit activations: so does what it is compared with."""
        return self.rounding is not None and bool(model.optimizations.w8a8)

    # ---- what the stock model and its exact self say, with 8-bit activations where ``rounded`` ----------------------
    @property
    @abstractmethod
    def reference_dtype(self) -> torch.dtype:
        """What the exact reference computes in."""

    @abstractmethod
    def traces(self, shape: str, rounded: bool = False) -> tuple[Trace, Trace]:
        """The baseline's trace of the batch of that shape, with the tokens that are forced on everyone, and the
        reference's.

        Raises:
            CheckpointError: the baseline's own logits are not finite.
        """

    @abstractmethod
    def locate(self, model: Any, shape: str) -> ErrorLocation | None:
        """Where ``model`` first leaves what rounding explains, on the batch of that shape; None if nowhere."""

    @abstractmethod
    def layers(self, rounded: bool) -> Iterator[channels.LayerOfBoth]:
        """Each layer of both, one after the other; ``rounded`` as everywhere."""

    @abstractmethod
    def losses(self, windows: Sequence[Sequence[int]], rounded: bool = False) -> tuple[Array, Array, list[Array]]:
        """Losses of the tokens of ``windows`` under the baseline and the reference, and per window the experts of the
        baseline, which were forced on the reference: none of a dense model."""

    @abstractmethod
    def stock_texts(
        self, batch: Batch, got: Sequence[Sequence[int]], max_new_tokens: int, rounded: bool = False
    ) -> tuple[list[list[int]], list[Divergence], tuple[Trace, Trace] | None]:
        """The stock model's greedy continuations of ``batch``, where those of the optimised model part from them, and
        the traces of the baseline and the reference that tell it, if there are any.

        Args:
            got: the optimised model's.
        """

    # ---- token by token --------------------------------------------------------------------------------------------
    def batch(self, shape: str) -> Batch:
        """The batch of that shape: held-out text where there is a tokenizer, else random tokens."""
        if shape not in self._batches:
            ids = self.heldout_ids()
            self._batches[shape] = (
                text_batch(shape, ids, pad_token_id=self.pad_token_id)
                if ids
                else random_batch(shape, self.config.vocab_size)
            )
        return self._batches[shape]

    def compare(self, model: Any, shape: str) -> tuple[Comparison, Trace]:
        """``model`` forced through the batch of that shape, and its trace."""
        rounded = self.rounds(model)
        baseline, reference = self.traces(shape, rounded)
        trace = locate_error.trace_model(model, self.batch(shape), baseline, self.ask)
        known = self._known.setdefault((shape, rounded), {})
        return compare_traces(trace, baseline, reference, self.dtype, known, bool(self.scheme)), trace

    def explain(
        self, optimizations: Optimizations, shape: str, *, build: BuildModel | None = None
    ) -> Explanation | None:
        """Why ``optimizations`` fail on the batch of that shape; None if, built again, they do not.

        Args:
            build: in place of the pair's own, for models that are compiled or tampered with.
        """
        return locate_error.explain(
            build or self.build,
            optimizations,
            compare=lambda model: self.compare(model, shape)[0],
            find=lambda model: self.wrong_channel(model) or self.locate(model, shape),
        )

    def failure(self, optimizations: Optimizations, shape: str, *, build: BuildModel | None = None) -> str:
        """Empty if ``optimizations`` agree with the baseline on that batch; else what :meth:`explain` says."""
        model = (build or self.build)(optimizations)
        comparison, _ = self.compare(model, shape)
        if comparison.passed:
            wrong = self.wrong_channel(model)
            return "" if wrong is None else f"step {optimizations.scheme}, {wrong}"
        del model
        found = self.explain(optimizations, shape, build=build)
        if found is not None:
            return str(found)
        return f"failed once and passed when repeated, which is a fault in itself: {'; '.join(comparison.failures())}"

    def wrong_channel(self, model: Any) -> ErrorLocation | None:
        """The first channel of a product of 8-bit weights that ``model`` computes wrongly; see ``channels``. None if
        there is none, or no such product."""
        if model.optimizations.scheme is None:
            return None
        batch = self.batch(channels.SHAPE)
        (ours,) = self.ask(locate_error.captures, model, batch=batch, forced=batch.nothing_forced())
        for layer in self.layers(self.rounds(model)):
            points = [point for point in ours.points if point.layer == layer.number]
            if (found := layer.first_wrong(points, self.dtype)) is not None:
                return found
        return None

    # ---- text ------------------------------------------------------------------------------------------------------
    def perplexity(self, model: Any) -> text.Perplexity | None:
        """Of the held-out text; None without a tokenizer."""
        windows = self.windows()
        if not windows:
            return None
        baseline, reference, chosen = self.losses(windows, self.rounds(model))
        ours = self.ask(text.token_losses, model, windows=windows, **({"chosen": chosen} if chosen else {}))
        return text.perplexity(ours, baseline, reference, self.dtype)

    def samples(self, model: Any, prompts: Sequence[str], *, max_new_tokens: int = SAMPLE_TOKENS) -> list[GreedyText]:
        """Greedy continuations of ``prompts``, one left-padded batch through ``generate`` of both models."""
        if self.tokenizer is None or not prompts:
            return []
        batch = Batch.of([self.encode(prompt) for prompt in prompts], pad_token_id=self.pad_token_id)
        got = self.greedy(model, batch, max_new_tokens, self.ask)
        expected, found, traces = self.stock_texts(batch, got, max_new_tokens, self.rounds(model))
        if traces is not None and traces[0].routing and not all(divergence.excused for divergence in found):
            found = text.excused_by_routing(found, self._with_experts_of(traces[0], model, batch), *traces, self.dtype)
        by_row = {divergence.row: divergence for divergence in found}
        return [
            GreedyText(
                prompt=prompt,
                baseline=self.tokenizer.decode(expected[row], skip_special_tokens=True),
                optimised=self.tokenizer.decode(got[row], skip_special_tokens=True),
                divergence=by_row[row].describe(self._decode_token) if row in by_row else "",
                passed=row not in by_row or by_row[row].excused,
            )
            for row, prompt in enumerate(prompts)
        ]

    def _with_experts_of(self, baseline: Trace, model: Any, batch: Batch) -> Trace:
        """``model`` uncompiled, with the tokens and experts of ``baseline``."""
        return self.ask(
            teacher_forcing.run,
            model,
            batch=batch,
            decode_steps=baseline.forced.shape[1],
            forced=baseline.forced,
            hidden=False,
            chosen=baseline.chosen,
            uncompiled=True,
        )

    def greedy(
        self,
        model: Any,
        batch: Batch,
        max_new_tokens: int,
        ask: Callable[..., list[list[int]]] = locate_error.call,
    ) -> list[list[int]]:
        """What ``model`` adds to the prompts of ``batch`` by itself.

        Args:
            ask: :meth:`ask` where it is the optimised one.
        """
        ends, padding = self.eos_token_ids, self.pad_token_id
        return ask(
            text.greedy,
            model,
            batch=batch,
            max_new_tokens=max_new_tokens,
            eos_token_ids=ends,
            pad_token_id=padding,
        )

    def windows(self) -> list[list[int]]:
        """The held-out text in pieces, to measure perplexity on; empty without a tokenizer."""
        return text.text_windows(self.heldout_ids(), length=PERPLEXITY_WINDOW, limit=PERPLEXITY_TOKENS)

    def check_finite_logits(self, baseline: Trace) -> None:
        """Raises:
        CheckpointError: those of the stock model are not.
        """
        if not np.isfinite(baseline.prefill_logits[baseline.valid]).all():
            raise CheckpointError(
                f"{self.name}: the stock model's own logits are not finite in {self.dtype}; try another dtype"
            )

    def heldout_ids(self) -> list[int]:
        """Tokens of the text that the tiny checkpoint was not trained on; any checkpoint is measured on it."""
        return self.encode(tiny.heldout_text()) if self.tokenizer is not None else []

    def encode(self, content: str) -> list[int]:
        """Token ids as the checkpoint's own tokenizer makes them."""
        return encode(self.tokenizer, content)

    def _decode_token(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    @property
    def eos_token_ids(self) -> list[int]:
        """What ends a text, by the generation config or else the config."""
        ids = getattr(self.generation_config, "eos_token_id", None)
        ids = self.config.eos_token_id if ids is None else ids
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's, or else what ends a text, or else 0, where the model knows it: it is masked either way."""
        candidates = (getattr(self.tokenizer, "pad_token_id", None), *self.eos_token_ids)
        vocabulary = self.config.vocab_size
        return next((token for token in candidates if token is not None and token < vocabulary), 0)


@dataclass(frozen=True)
class PairWeights:
    """A source of stock tensors that was found fit to be compared, and how this project's model is made of it.

    Attributes:
        scheme, rounding, ranks: see ``Pair``.
    """

    name: str
    source: NamedSource
    dtype: torch.dtype
    build: BuildModel
    folder: Path | None = None
    tokenizer: Any = None
    assume_tp: int | None = None
    scheme: str = ""
    rounding: InputRounding | None = None
    ranks: int = 1


def weights_of_checkpoint(
    path: Path | str | None,
    *,
    dtype: str | torch.dtype,
    device: str,
    decode_steps: int,
    assume_tp: int | None = None,
) -> PairWeights:
    """A checkpoint folder; None for the tiny one of the package.

    Raises:
        CheckpointError: the folder is unusable, or its tokenizer does not fit it.
        UnsupportedError: the ranks that there are cannot share the model.
    """
    folder = Path(path) if path is not None else tiny.path()
    source = open_checkpoint(folder, assume_tp=assume_tp)
    Shard(0, rank_count()).check(source.config)
    # What does not fit is found here, and named, before the stock model meets it in its own way.
    skeleton(lambda: Qwen2ForCausalLM(source.config), source)
    tokenizer = load_tokenizer(folder)
    check_texts(source.config, tokenizer, decode_steps, str(folder))
    read_generation_config(folder, source.config.vocab_size)
    parsed = parse_dtype(dtype) or source.stored_dtype()
    meant, scheme, rounding = as_meant(source, parsed, rank_count())

    def build(optimizations: Optimizations) -> Any:
        model = Qwen2ForCausalLM.from_pretrained(
            folder, dtype=parsed, device=device, optimizations=optimizations, assume_tp=assume_tp
        )
        return model.eval()

    name = str(path) if path is not None else "tiny checkpoint"
    return PairWeights(name, meant, parsed, build, folder, tokenizer, assume_tp, scheme, rounding, rank_count())


def weights_of_shape(shape: str, *, dtype: torch.dtype, device: str, seed: int) -> PairWeights:
    """Random weights in the small version of a member of the family: see ``accuracy.configs``."""
    config = small_config(shape)
    state = random_state_dict(config, seed=seed, dtype=dtype)

    def build(optimizations: Optimizations) -> Any:
        model = Qwen2ForCausalLM.from_state_dict(config, state, dtype=dtype, device=device, optimizations=optimizations)
        return model.eval()

    return PairWeights(f"random {shape}", StateDictSource(config, state), dtype, build)


def encode(tokenizer: Any, content: str) -> list[int]:
    """Token ids of a text."""
    return list(tokenizer(content)["input_ids"])


def check_texts(config: Any, tokenizer: Any, decode_steps: int, where: str) -> None:
    """Refuse a model that the texts and batches which it is compared on do not fit.

    Args:
        tokenizer: None where the batches are random tokens.

    Raises:
        CheckpointError: a token outside the vocabulary, or too few positions.
    """
    needed = max(max(lengths) for lengths in BATCH_SHAPES.values()) + decode_steps
    if tokenizer is not None:
        heldout, *prompts = (encode(tokenizer, content) for content in (tiny.heldout_text(), *tiny.prompts()))
        largest = max(token for ids in (heldout, *prompts) for token in ids)
        if largest >= config.vocab_size:
            raise CheckpointError(
                f"{where}: its tokenizer makes token id {largest}, and the model has vocab_size={config.vocab_size}: "
                "fetch the tokenizer that belongs to it"
            )
        needed = max(needed, PERPLEXITY_WINDOW, *(len(ids) + SAMPLE_TOKENS for ids in prompts))
    if needed > config.max_position_embeddings:
        raise CheckpointError(
            f"{where}: max_position_embeddings={config.max_position_embeddings}, and the texts it is compared on need "
            f"{needed}: raise it in a copy of config.json; the comparison holds at any position"
        )
