"""The stock model and its float64 self over known tokens, one layer at a time.

Where every token is known beforehand, the two loops of a computation, over forward passes and over layers, may change
places: what layer i computes in decode step t depends on layer i - 1 in step t and on the keys and values that layer i
itself kept in earlier steps. So all passes go through layer i, with its cache, before layer i + 1 is read; only its
output for every position stays. Each pass still has its own tokens, mask, positions and cache, and goes through
transformers' own code in operations of the same sizes: on the CPU the result is the whole model's, bit for bit.

A layer is a stock model of one layer: masks, rotary embedding and cache are the installed version's own. Weights are
read from their files for one layer, upcast to float64 for the reference, and dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config

from qwen2_npu.checkpoint.naming import EMBEDDING, HEAD
from qwen2_npu.checkpoint.sources import NamedSource
from qwen2_npu.checkpoint.weights import stock_shapes
from qwen2_npu.compat import CACHE_NAME, cache_of, is_sparse
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.intermediates import PassRecorder, capturing
from qwen2_npu.conformance.accuracy.noise import Array
from qwen2_npu.conformance.accuracy.quantised import Dequantised, InputRounding
from qwen2_npu.conformance.accuracy.routing import Choices, Routers, stacked, watching
from qwen2_npu.conformance.accuracy.stock import check_finite, exact, exact_reference, stock_from_state_dict
from qwen2_npu.conformance.accuracy.teacher_forcing import position_ids_of, prompt_and_forced, to_numpy

NORM = "model.norm.weight"


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass: ``ids`` and ``positions`` (B, S), ``mask`` (B, tokens so far and these)."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


Passes = Sequence[ForwardPass]
"""Passes that share one cache, in their order."""


def step_by_step(batch: Batch, forced: Array) -> Passes:
    """The prompt, then one token at a time, as ``teacher_forcing.run`` feeds them."""
    mask = batch.attention_mask
    lengths = mask.sum(dim=1, keepdim=True)
    found = [ForwardPass(batch.input_ids, mask, position_ids_of(mask))]
    for step in range(forced.shape[1]):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        found.append(ForwardPass(torch.from_numpy(forced[:, step : step + 1].copy()), mask, lengths + step))
    return found


def at_once(batch: Batch, forced: Array) -> Passes:
    """Prompt and forced tokens in one pass, as ``teacher_forcing.run_reference`` feeds them."""
    ids, mask = prompt_and_forced(batch, forced)
    return [ForwardPass(ids, mask, position_ids_of(mask))]


def layer_parameters(config: Any) -> int:
    """How many numbers the weights of the largest layer are."""
    found = [0] * config.num_hidden_layers
    for name, shape in stock_shapes(config).items():
        if name.startswith("model.layers."):
            found[int(name.split(".")[2])] += math.prod(shape)
    return max(found)


@dataclass(frozen=True)
class Feed:
    """What a model is to compute: passes that share one cache, what is kept of each pass's logits (B, S, V), and the
    experts (layers, B, C, k) that are forced on the stock model where it is a mixture: None for its own choice. Those
    of each of its feeds are forced on the reference's feed of the same number."""

    passes: Passes
    keep: Callable[[Array], Array] = lambda logits: logits
    chosen: Array | None = None

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """(B, C) where there is a token."""
        return self.passes[-1].mask.bool().numpy()


@dataclass(frozen=True)
class LayerAnswer:
    """Of one pass: what was kept of its logits, the final hidden states (B, S, H), and what the routers of a mixture
    said."""

    logits: Array
    hidden: Array
    choices: Choices | None = None


@dataclass
class _Side:
    """One of the two models on its way through the layers. ``states``: per pass, the output of the layer before.
    ``said``: per pass, what the routers so far said. ``chosen``: per feed, the experts of the layer before, if any."""

    feeds: Sequence[Feed]
    device: str
    states: list[list[torch.Tensor]] = field(default_factory=list)
    answers: list[list[LayerAnswer]] = field(default_factory=list)
    said: list[list[list[Choices]]] = field(default_factory=list)
    chosen: list[Array | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.said = [[[] for _ in feed.passes] for feed in self.feeds]

    def through(
        self, part: Any, index: int, record: bool, chosen: Sequence[Array | None] | None = None
    ) -> list[PassRecorder]:
        """Take all passes through one layer.

        Args:
            chosen: per feed, the experts (1, B, C, k) that are forced on this layer; None for its own choice.
        """
        recorders: list[PassRecorder] = []
        self.chosen = list(chosen or [None] * len(self.feeds))
        with exact(part):
            for which, feed in enumerate(self.feeds):
                with watching(part, feed.live, self.chosen[which], first_layer=index) as routers:
                    recorders += self._feed(part, index, record, which, routers)
                self.chosen[which] = routers.chosen
        return recorders

    def _feed(self, part: Any, index: int, record: bool, which: int, routers: Routers) -> list[PassRecorder]:
        recorders: list[PassRecorder] = []
        states, cache = self.states[which], dict[str, Any]()
        for number, one in enumerate(self.feeds[which].passes):
            arguments = {
                "inputs_embeds": states[number],
                "attention_mask": one.mask.to(self.device),
                "position_ids": one.positions.to(self.device),
                "use_cache": len(states) > 1,
                **cache,
            }
            columns = one.mask.shape[1]
            routers.start(columns - one.ids.shape[1], columns)
            if record:
                recorder = _recorder(one)
                with capturing(part, new=recorder.new, total=recorder.total, first_layer=index) as recorder:
                    out = part.model(**arguments)
                recorders.append(recorder)
            else:
                out = part.model(**arguments)
            states[number] = out.last_hidden_state
            cache = {CACHE_NAME: cache_of(out)}
            if (choices := routers.taken()) is not None:
                self.said[which][number].append(choices)
        return recorders

    def finish(self, part: Any, head: Callable[[torch.Tensor], torch.Tensor], record: bool) -> list[PassRecorder]:
        """Final norm and logits."""
        recorders: list[PassRecorder] = []
        for feed, states, said in zip(self.feeds, self.states, self.said, strict=True):
            answers: list[LayerAnswer] = []
            for one, state, choices in zip(feed.passes, states, said, strict=True):
                with exact(part):
                    hidden = part.model.norm(state)
                logits = head(hidden)
                if record:
                    recorders.append(_recorder(one))
                    for name, tensor in (("residual into norm", state), ("norm", hidden), ("lm_head", logits)):
                        recorders[-1].add(None, name, tensor)
                answers.append(LayerAnswer(feed.keep(to_numpy(logits)), to_numpy(hidden), stacked(choices)))
            self.answers.append(answers)
        return recorders


@dataclass
class LayerByLayer:
    """The stock model of a checkpoint in ``dtype`` on ``device``, and its float64 self on the CPU.

    Attributes:
        where: the checkpoint, for messages.
        rounding: what 8-bit activations are, where a question is asked with them.
        progress: called before each layer, with words that name it.
    """

    source: NamedSource
    dtype: torch.dtype
    device: str = "cpu"
    where: str = "the weights"
    rounding: InputRounding | None = None
    progress: Callable[[str], None] = lambda label: None

    def run(
        self, stock: Sequence[Feed], reference: Sequence[Feed], rounded: bool = False
    ) -> tuple[list[list[LayerAnswer]], list[list[LayerAnswer]]]:
        """What the stock model and the reference answer, per feed and pass. Reads every weight once.

        Args:
            rounded: with 8-bit activations.

        Raises:
            CheckpointError: a weight is NaN or infinite, naming it; or the files changed since they were opened.
        """
        sides = _Side(stock, self.device), _Side(reference, "cpu")
        for _ in self._layers(*sides, record=False, rounded=rounded):
            pass
        return sides[0].answers, sides[1].answers

    def points(
        self, passes: Passes, chosen: Array | None = None, rounded: bool = False
    ) -> Iterator[tuple[int | None, list[PassRecorder], list[PassRecorder]]]:
        """The intermediate tensors of ``passes``, layer after layer: its number, and per pass those of the stock model
        and of the reference. Last what belongs to no layer, with None.

        Args:
            chosen: the experts to force on a mixture, as ``Trace.chosen`` has them.
            rounded: with 8-bit activations.
        """
        feed = Feed(passes, keep=lambda logits: logits[:0], chosen=chosen)
        yield from self._layers(_Side([feed], self.device), _Side([feed], "cpu"), record=True, rounded=rounded)

    @torch.no_grad()
    def _layers(
        self, stock: _Side, reference: _Side, *, record: bool, rounded: bool
    ) -> Iterator[tuple[int | None, list[PassRecorder], list[PassRecorder]]]:
        self._embed(stock, reference)
        count, sparse = self.source.config.num_hidden_layers, 0
        started = time.perf_counter()
        for index in range(count):
            pace = f", {(time.perf_counter() - started) / index:.2g} s per layer" if index else ""
            self.progress(f"layer {index + 1} of {count}{pace}")
            parts = self._parts(f"model.layers.{index}.", index)
            parts[0].model.norm = parts[1].model.norm = nn.Identity()  # the layer's output is asked for, as it is
            known = [None if feed.chosen is None else feed.chosen[sparse : sparse + 1] for feed in stock.feeds]
            with ExitStack() as stack:
                for part in parts if rounded else ():
                    assert self.rounding is not None
                    stack.enter_context(self.rounding.of(part, index))
                ours = stock.through(parts.pop(0), index, record, known)
                true = reference.through(parts.pop(0), index, record, stock.chosen)
            sparse += is_sparse(self.source.config, index)
            yield index, ours, true
            del ours, true
        self.progress(f"head, {(time.perf_counter() - started) / count:.2g} s per layer")
        yield self._finish(stock, reference, record)

    def _embed(self, *sides: _Side) -> None:
        """Rows of the embedding, in ``dtype``: no more of it comes into memory than is needed."""
        weight = self.source.read([EMBEDDING])[EMBEDDING]
        check_finite({EMBEDDING: weight}, self.where, self.dtype)
        for side, dtype in zip(sides, (self.dtype, torch.float64), strict=True):
            side.states = [
                [weight[one.ids].to(self.dtype).to(side.device, dtype) for one in feed.passes] for feed in side.feeds
            ]

    def layer(self, index: int) -> tuple[Any, Any]:
        """Models of that layer alone: the stock one, and the reference."""
        stock, reference = self._parts(f"model.layers.{index}.", index)
        return stock, reference

    def part(self, prefix: str, *layers: int) -> Any:
        """The stock model of these layers alone (one or none), in ``dtype`` on the device.

        Args:
            prefix: what the names of its tensors begin with.

        Raises:
            CheckpointError: a weight is NaN or infinite, naming it.
        """
        return self._parts(prefix, *layers, exactly=False)[0]

    def _parts(self, prefix: str, *layers: int, exactly: bool = True) -> list[Any]:
        """Stock models of these layers alone (one or none): in ``dtype`` on the device, and in float64."""
        config = self.source.config
        names = [name for name in stock_shapes(config) if name.startswith(prefix)]

        def as_first(name: str) -> str:
            return name.replace(prefix, "model.layers.0.") if layers else name

        weights = self.source.read(names)
        scaled = self.source.scaled if exactly and isinstance(self.source, Dequantised) else ()
        meant = {as_first(name): weights[name] for name in names if name in scaled}
        renamed = {as_first(name): weights.pop(name) for name in names}
        # What every stock model has, and these do not use.
        for name, shape in ((EMBEDDING, (1, config.hidden_size)), (NORM, (config.hidden_size,))):
            renamed.setdefault(name, torch.zeros(shape))
        stock = stock_from_state_dict(_part_of(config, layers), renamed, dtype=self.dtype, device=self.device)
        del renamed
        state = {name.replace("model.layers.0.", prefix): tensor for name, tensor in stock.state_dict().items()}
        check_finite(state, self.where)
        return [stock, exact_reference(stock, torch.float64, meant.items())] if exactly else [stock]

    def _finish(
        self, stock: _Side, reference: _Side, record: bool
    ) -> tuple[None, list[PassRecorder], list[PassRecorder]]:
        parts = self._parts(NORM)
        name = EMBEDDING if self.source.config.tie_word_embeddings else HEAD
        weight = self.source.read([name])[name]
        check_finite({name: weight}, self.where, self.dtype)
        weight = weight.to(self.device, self.dtype)
        rows = max(1, layer_parameters(self.source.config) // weight.shape[1])

        def exact_head(hidden: torch.Tensor) -> torch.Tensor:
            """In pieces: the head of a model with many tokens is larger than one of its layers."""
            logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
            for start in range(0, len(weight), rows):
                piece = weight[start : start + rows].to("cpu", torch.float64)
                logits[..., start : start + rows] = F.linear(hidden, piece)
            return logits

        ours = stock.finish(parts[0], lambda hidden: F.linear(hidden, weight), record)
        return None, ours, reference.finish(parts[1], exact_head, record)


def _recorder(one: ForwardPass) -> PassRecorder:
    return PassRecorder(one.mask[:, -one.ids.shape[1] :].sum(1).tolist(), one.mask.sum(1).tolist(), left=False)


def _part_of(config: Qwen2Config, layers: Sequence[int]) -> Qwen2Config:
    """The configuration of a model that has these layers only, and next to no vocabulary."""
    values = config.to_dict() | {
        "num_hidden_layers": len(layers), "vocab_size": 1, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if values.get("layer_types") is not None:
        values["layer_types"] = [values["layer_types"][index] for index in layers]
    if "num_experts" in values:
        values["decoder_sparse_step"] = 1
        values["mlp_only_layers"] = [number for number, index in enumerate(layers) if not is_sparse(config, index)]
    return type(config).from_dict(values)
