"""What 8 bits cost: a quantised checkpoint against the floating-point one that it was made of, on held-out text.

This says nothing about this project's kernels, and passes or fails nothing: both sides are the stock class in float32,
so that what differs is the numbers alone, and no rounding of a model's dtype. Each covered module is also put into 8
bits alone, everything else left in floating point, which tells where the cost comes from.

All goes through the layers once, one layer in memory. A module alone in 8 bits changes nothing before its own layer:
there its text parts from that of the floating-point model, and goes on through the layers after it beside the others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from qwen2_npu.checkpoint.experts import one_by_one
from qwen2_npu.checkpoint.naming import EMBEDDING, HEAD
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.sources import NamedSource, open_checkpoint
from qwen2_npu.checkpoint.tokenizer import load_tokenizer
from qwen2_npu.checkpoint.weights import check_source, stock_shapes
from qwen2_npu.compat import expert_count
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.layer_by_layer import NORM, LayerByLayer
from qwen2_npu.conformance.accuracy.pair import PERPLEXITY_TOKENS, PERPLEXITY_WINDOW, encode
from qwen2_npu.conformance.accuracy.quantised import Dequantised, InputRounding, as_meant
from qwen2_npu.errors import UnsupportedError

MODULE_WINDOWS = 2
"""Windows of the text that each module is measured on alone; the whole model is on all of them."""
TOGETHER = 16
"""Modules whose texts go through a layer together."""


@dataclass(frozen=True)
class Effect:
    """Of a text, against the floating-point model.

    Attributes:
        perplexity: of the changed model.
        loss: its mean loss minus that of the floating-point model, in nats per token.
        kl, kl_max: KL(floating-point || changed), in nats per token.
        agreement: share of positions where both prefer the same token.
    """

    perplexity: float
    loss: float
    kl: float
    kl_max: float
    agreement: float


@dataclass(frozen=True)
class QuantisingCost:
    """See the module's text.

    Attributes:
        against: the floating-point checkpoint.
        tokens: whose loss was measured.
        perplexity: of the floating-point model.
        whole: of all modules in 8 bits together, on the whole text.
        modules: of each alone, on the beginning of the text. The experts of a layer count as one.
        left_out: why there are none; empty if there are.
    """

    scheme: str
    against: str
    tokens: int
    perplexity: float
    whole: Effect
    modules: dict[str, Effect]
    left_out: str = ""

    def costliest(self, count: int) -> list[tuple[str, Effect]]:
        """The modules whose KL alone is largest."""
        return sorted(self.modules.items(), key=lambda item: -item[1].kl)[:count]

    def by_kind(self) -> dict[str, float]:
        """Kind of module -> the sum of its modules' KL, in order of it."""
        found: dict[str, float] = {}
        for name, effect in self.modules.items():
            kind = name.split(".", 3)[3]
            found[kind] = found.get(kind, 0.0) + effect.kl
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Comparable:
    """Two checkpoints that :func:`measure` can hold against each other."""

    quantised: Dequantised
    floating: NamedSource
    against: str
    scheme: str
    rounding: InputRounding | None
    windows: list[list[int]]


def comparable(model_path: Path | None, against: Path, dtype: torch.dtype | None = None) -> Comparable:
    """Look at both, and read no weights.

    Args:
        dtype: what the models compute in; None for what the quantised checkpoint is stored in.

    Raises:
        CheckpointError: a folder is unusable.
        UnsupportedError: the two are no such checkpoints, or there is no text to measure.
    """
    where = str(model_path or "the tiny checkpoint")
    source, floating = open_checkpoint(model_path or tiny.path()), open_checkpoint(against)
    meant, scheme, rounding = as_meant(source, dtype or source.stored_dtype())
    if not isinstance(meant, Dequantised):
        raise UnsupportedError(
            f"--against {against}: {where} is not quantised, so there is nothing that 8 bits cost; give the quantised "
            "folder as --model-path (qwen2-npu quantize writes one)"
        )
    if quantization_of(floating.config) is not None:
        raise UnsupportedError(
            f"--against {against}: its weights are quantised, too; give the folder in floating point that {where} was "
            "made of"
        )
    check_source(source)
    check_source(floating)
    ours, theirs = stock_shapes(meant.config), stock_shapes(floating.config)
    if (name := next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)) is not None:
        raise UnsupportedError(
            f"--against {against}: {where} was not made of it: {name} has shape {ours.get(name)} there, and "
            f"{theirs.get(name)} here; give the folder that it was made of"
        )
    tokenizer = load_tokenizer(model_path or tiny.path()) or load_tokenizer(against)
    if tokenizer is None:
        raise UnsupportedError(
            f"--against {against}: neither folder has a tokenizer, and the cost is measured on text: put its files "
            "into one of them"
        )
    windows = text.text_windows(
        encode(tokenizer, tiny.heldout_text()), length=PERPLEXITY_WINDOW, limit=PERPLEXITY_TOKENS
    )
    if expert_count(meant.config):
        rounding = None  # no model computes a mixture with 8-bit activations
    return Comparable(meant, floating, str(against), scheme, rounding, windows)


@torch.no_grad()
def measure(
    given: Comparable, device: str = "cpu", progress: Callable[[str], None] = lambda label: None
) -> QuantisingCost:
    """What it costs. Reads all weights of both checkpoints once.

    Args:
        progress: called before each layer, with words that name it.

    Raises:
        CheckpointError: a weight is NaN or infinite, naming it; or the files changed since they were opened.
    """
    plain, changed = (
        LayerByLayer(source, torch.float32, device, where)
        for source, where in ((given.floating, given.against), (given.quantised, given.quantised.where))
    )
    base, whole = (_embedded(models, given.windows) for models in (plain, changed))
    alone: dict[str, list[torch.Tensor]] = {}
    left_out = ""
    count, started = given.quantised.config.num_hidden_layers, time.perf_counter()
    for index in range(count):
        pace = f", {(time.perf_counter() - started) / index:.2g} s per layer" if index else ""
        progress(f"layer {index + 1} of {count}{pace}")
        part, other = (models.part(f"model.layers.{index}.", index) for models in (plain, changed))
        part.model.norm = other.model.norm = nn.Identity()
        if (differing := _other_tensor(part, other, given, index)) and not left_out:
            left_out = f"{differing} is another one in {given.against}: no module fits there alone"
        alone = _through_together(part, alone)
        with ExitStack() as stack:
            if given.rounding is not None:
                stack.enter_context(given.rounding.of(other, index))
            whole = [_through(other, state) for state in whole]
        for module, names in _modules(given.quantised, index).items():
            with _alone(part, other, names, index, given.rounding):
                alone[module] = [_through(part, state) for state in base[:MODULE_WINDOWS]]
        base = [_through(part, state) for state in base]
        del part, other
    progress(f"head, {(time.perf_counter() - started) / count:.2g} s per layer")
    heads = [_head(models) for models in (plain, changed)]
    scores: dict[str | None, list[_Scores]] = {}
    plain_losses = []
    for number, window in enumerate(given.windows):
        truth = F.log_softmax(heads[0](base[number]).double(), dim=-1)
        plain_losses.append(_losses(truth, window))
        scores.setdefault(None, []).append(_Scores.of(truth, heads[1](whole[number]), window))
        for module, states in alone.items() if number < MODULE_WINDOWS and not left_out else ():
            scores.setdefault(module, []).append(_Scores.of(truth, heads[0](states[number]), window))
    losses = np.concatenate(plain_losses)
    effects = {name: _effect(parts, losses) for name, parts in scores.items()}
    return QuantisingCost(
        scheme=given.scheme,
        against=given.against,
        tokens=len(losses),
        perplexity=float(np.exp(losses.mean())),
        whole=effects.pop(None),
        modules={name: effect for name, effect in effects.items() if name is not None},
        left_out=left_out,
    )


# ---- through the layers ---------------------------------------------------------------------------------------------
def _embedded(models: LayerByLayer, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    weight = models.source.read([EMBEDDING])[EMBEDDING]
    return [weight[torch.tensor([list(window)])].to(models.device, models.dtype) for window in windows]


def _through(part: Any, state: torch.Tensor) -> torch.Tensor:
    rows, tokens = state.shape[:2]
    mask = torch.ones(rows, tokens, dtype=torch.long, device=state.device)
    positions = torch.arange(tokens, device=state.device).expand(rows, tokens)
    out = part.model(inputs_embeds=state, attention_mask=mask, position_ids=positions, use_cache=False)
    found: torch.Tensor = out.last_hidden_state
    return found


def _through_together(part: Any, alone: Mapping[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    names = list(alone)
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(names), TOGETHER):
        some = names[start : start + TOGETHER]
        windows = [_through(part, torch.cat(states)) for states in zip(*(alone[name] for name in some), strict=True)]
        found |= {name: [window[place : place + 1] for window in windows] for place, name in enumerate(some)}
    return found


def _modules(source: Dequantised, layer: int) -> dict[str, list[str]]:
    """The modules of a layer that are in 8 bits -> their tensors. The experts count as one."""
    found: dict[str, list[str]] = {}
    for name in stock_shapes(source.config):
        if name in source.scaled and name.startswith(f"model.layers.{layer}."):
            found.setdefault(re.sub(r"experts\.\d+\.", "experts.", name.removesuffix(".weight")), []).append(name)
    return found


@contextmanager
def _alone(part: Any, other: Any, names: Sequence[str], layer: int, rounding: InputRounding | None) -> Iterator[None]:
    """Within it, ``part`` has these weights as ``other`` has them, and rounds what goes into them."""
    mine, theirs = (one_by_one(dict(model.named_parameters())) for model in (part, other))
    first = [name.replace(f"model.layers.{layer}.", "model.layers.0.") for name in names]
    before = {name: mine[name].clone() for name in first}
    modules = {name.removesuffix(".weight") for name in names}
    with ExitStack() as stack:
        if rounding is not None:
            stack.enter_context(replace(rounding, covers=lambda module: module in modules).of(part, layer))
        for name in first:
            mine[name].copy_(theirs[name])
        try:
            yield
        finally:
            for name, tensor in before.items():
                mine[name].copy_(tensor)


def _other_tensor(part: Any, other: Any, given: Comparable, layer: int) -> str:
    """The name of a tensor of this layer that is not in 8 bits and yet not the floating-point checkpoint's."""
    dtype = given.quantised.stored_dtype()
    theirs = one_by_one(dict(other.named_parameters()))
    for name, tensor in one_by_one(dict(part.named_parameters())).items():
        stock = name.replace("model.layers.0.", f"model.layers.{layer}.")
        inside = stock.startswith(f"model.layers.{layer}.") and stock not in given.quantised.scaled
        if inside and not torch.equal(tensor.to(dtype), theirs[name].to(dtype)):
            return stock
    return ""


def _head(models: LayerByLayer) -> Callable[[torch.Tensor], torch.Tensor]:
    """(1, S, H) after the last layer -> logits (S, V)."""
    norm = models.part(NORM).model.norm
    name = EMBEDDING if models.source.config.tie_word_embeddings else HEAD
    weight = models.source.read([name])[name].to(models.device, models.dtype)
    return lambda state: F.linear(norm(state), weight)[0]


# ---- numbers --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Scores:
    """Of one window: per position the loss, the KL, and whether the best token is the same."""

    losses: Any
    kl: Any
    same: Any

    @classmethod
    def of(cls, truth: torch.Tensor, logits: torch.Tensor, window: Sequence[int]) -> _Scores:
        """``truth`` (S, V): log-probabilities of the floating-point model, in float64."""
        found = F.log_softmax(logits.double(), dim=-1)
        kl = (truth.exp() * (truth - found)).sum(-1)
        same = truth.argmax(-1) == found.argmax(-1)
        return cls(_losses(found, window), kl.cpu().numpy(), same.cpu().numpy())


def _losses(log_probabilities: torch.Tensor, window: Sequence[int]) -> Any:
    following = torch.tensor(list(window[1:]), device=log_probabilities.device)
    return -log_probabilities[:-1].gather(1, following[:, None])[:, 0].cpu().numpy()


def _effect(parts: Sequence[_Scores], plain: Any) -> Effect:
    losses, kl, same = (np.concatenate([getattr(part, key) for part in parts]) for key in ("losses", "kl", "same"))
    return Effect(
        perplexity=float(np.exp(losses.mean())),
        loss=float(losses.mean() - plain[: len(losses)].mean()),
        kl=float(kl.mean()),
        kl_max=float(kl.max()),
        agreement=float(same.mean()),
    )
