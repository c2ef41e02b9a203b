"""The experts that the routers of a mixture choose: taken down, and forced on other models as tokens are.

A router whose two best candidates differ by less than rounding sends a token to either of two experts, which have
nothing in common. So the experts of the stock model, per layer and position, are forced on its float64 self and on the
optimised model, and what is left between the models is rounding. What a model would have chosen by itself is taken
down before that, and judged by ``compare_routing``.

Where a model chooses the forced experts, its own weights stand. Elsewhere they are those of its own softmax at the
forced experts. Models are watched while they run uncompiled; a dense one has nothing to watch.

Shapes: L sparse layers, B rows, C columns of the left-padded batch with the tokens forced after it, S columns of one
pass, E experts, k of them for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen2_npu.conformance.accuracy.noise import Array

UNKNOWN = -1
"""In place of an expert where nothing is forced yet, and the first model that comes there decides; or where a model
chooses none, since nobody wants what follows."""


@dataclass(frozen=True)
class Choices:
    """What the routers said: numbers of their layers, logits (L, B, S, E), and the experts that the model would choose
    by itself (L, B, S, k), :data:`UNKNOWN` where it does not compute the token. Meaningless at padding."""

    layers: tuple[int, ...]
    logits: Array
    wanted: Array

    def columns(self, start: int, stop: int | None = None) -> Choices:
        """Of these columns alone."""
        return Choices(self.layers, self.logits[:, :, start:stop], self.wanted[:, :, start:stop])

    @classmethod
    def joined(cls, parts: Sequence[Choices]) -> Choices:
        """One column after the other."""
        return cls(
            parts[0].layers,
            np.concatenate([part.logits for part in parts], axis=2),
            np.concatenate([part.wanted for part in parts], axis=2),
        )


def stacked(layers: Sequence[Choices]) -> Choices | None:
    """Those of layers that were computed one by one; None of a dense model."""
    if not layers:
        return None
    return Choices(
        tuple(index for each in layers for index in each.layers),
        np.concatenate([each.logits for each in layers]),
        np.concatenate([each.wanted for each in layers]),
    )


def live_columns(attention_mask: torch.Tensor, steps: int) -> npt.NDArray[np.bool_]:
    """(B, C) whether there is a token: of prompts with that mask and ``steps`` tokens forced after each."""
    prompt = attention_mask.bool().cpu().numpy()
    return np.concatenate((prompt, np.ones((len(prompt), steps), bool)), axis=1)


class Routers:
    """Those of one model over one batch. See the module's text and :func:`watching`.

    Args:
        layers: number -> block of experts, in order.
        live: (B, C).
        chosen: (L, B, C, k) experts to force; None where the model is the one that decides.
        left: whether the model moves the tokens of each row to the left.
    """

    def __init__(
        self, layers: dict[int, Any], live: npt.NDArray[np.bool_], chosen: Array | None, *, left: bool
    ) -> None:
        self.layers = layers
        self._live = torch.from_numpy(live)
        self._left = left
        self._chosen: dict[int, torch.Tensor] = {}
        if chosen is not None:
            assert len(chosen) == len(layers), f"choices of {len(chosen)} layers, the model has {len(layers)}"
            self._chosen = {index: torch.from_numpy(part.copy()) for index, part in zip(layers, chosen, strict=True)}
        self._said: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._columns = slice(0, 0)

    def start(self, start: int, stop: int) -> None:
        """The next pass feeds these columns."""
        self._columns = slice(start, stop)
        self._said = {}

    def taken(self) -> Choices | None:
        """What was said in the last pass; None of a dense model."""
        if not self._said:
            return None
        logits, wanted = zip(*(self._said[index] for index in self.layers), strict=True)
        return Choices(tuple(self.layers), torch.stack(logits).numpy(), torch.stack(wanted).numpy())

    @property
    def chosen(self) -> Array | None:
        """(L, B, C, k) the experts that served each token, to be forced on others; None of a dense model."""
        if not self._chosen:
            return None
        return torch.stack([self._chosen[index] for index in self.layers]).numpy()

    def route(
        self, layer: int, logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, normalised: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take down what the router of ``layer`` says, and put the forced choice in its place.

        Args:
            logits: (tokens, E).
            weights, experts: (tokens, k), the model's own.
        """
        columns, live = self._columns, self._live[:, self._columns]
        order = torch.argsort((~live).int(), dim=1, stable=True) if self._left else None
        if len(logits) == len(live):  # the last layer of a prefill whose last logits alone are wanted, or a decode step
            columns, live, order = slice(columns.stop - 1, columns.stop), live[:, -1:], None
        assert len(logits) == live.numel(), f"a router of {len(logits)} tokens in a pass of {live.numel()}"
        own = _columns_of(experts.detach().cpu().long(), live.shape, order)
        exact = logits.dtype == torch.float64
        said = logits.detach().to("cpu", torch.float64 if exact else torch.float32)
        width = self._columns.stop - self._columns.start
        self._said[layer] = _last(_columns_of(said, live.shape, order), width, torch.nan), _last(own, width, UNKNOWN)
        forced = self._decided(layer, own, columns)
        forced = torch.where(live[:, :, None], forced, own)
        same = (forced.sort(-1).values == own.sort(-1).values).all(-1, keepdim=True)
        if bool(same.all()):
            return weights, experts
        forced, same = (_slots_of(each, order) for each in (forced, same))
        probabilities = torch.softmax(logits.detach().cpu(), dim=-1, dtype=torch.float32).gather(-1, forced)
        if normalised:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        own_weights, own_experts = weights.detach().cpu(), experts.detach().cpu()
        return (
            torch.where(same, own_weights, probabilities.to(own_weights.dtype)).to(weights.device),
            torch.where(same, own_experts, forced.to(own_experts.dtype)).to(experts.device),
        )

    def _decided(self, layer: int, own: torch.Tensor, columns: slice) -> torch.Tensor:
        """(B, S, k) the experts of these columns; where none are decided yet, ``own`` are from now on."""
        if layer not in self._chosen:
            self._chosen[layer] = own.new_full((*self._live.shape, own.shape[-1]), UNKNOWN)
        decided = self._chosen[layer][:, columns]
        decided.copy_(torch.where(decided == UNKNOWN, own, decided))
        return decided


def _last(values: torch.Tensor, columns: int, rest: float) -> torch.Tensor:
    """(B, S, n) as the last of so many columns, the others filled with ``rest``."""
    return torch.nn.functional.pad(values, (0, 0, columns - values.shape[1], 0), value=rest)


def _columns_of(values: torch.Tensor, shape: Sequence[int], order: torch.Tensor | None) -> torch.Tensor:
    """(tokens, n) as the model has them -> (B, S, n) by column."""
    values = values.reshape(*shape, -1)
    return values if order is None else torch.empty_like(values).scatter_(1, _wide(order, values), values)


def _slots_of(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """(B, S, n) by column -> (tokens, n) as the model has them."""
    values = values if order is None else values.gather(1, _wide(order, values))
    return values.reshape(-1, values.shape[-1])


def _wide(order: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return order[:, :, None].expand(-1, -1, values.shape[-1])


def sparse_layers(model: Any, first_layer: int = 0) -> dict[int, Any]:
    """Number -> block of experts; of the stock model and of the optimised one.

    Args:
        first_layer: the number of the model's first layer, where the model is a part of a larger one.
    """
    layers = getattr(getattr(model, "model", None), "layers", ())
    return {index: layer.mlp for index, layer in enumerate(layers, first_layer) if hasattr(layer.mlp, "experts")}


@contextmanager
def watching(
    model: Any, live: npt.NDArray[np.bool_], chosen: Array | None = None, *, first_layer: int = 0
) -> Iterator[Routers]:
    """Within it, the routers of ``model`` are taken down, and choose what ``chosen`` says. Tell it of every pass by
    ``start``. A model that has compiled steps is left alone.

    Args:
        live: (B, C) whether there is a token.
        chosen: (L, B, C, k); None where the model decides: its first choice at each place then holds for later passes.
        first_layer: the number of the model's first layer.
    """
    layers = {} if getattr(model, "compiled_steps", None) else sparse_layers(model, first_layer)
    left = bool(getattr(getattr(model, "optimizations", None), "fixed_kv_cache", False))
    routers = Routers(layers, live, chosen if layers else None, left=left)
    with ExitStack() as stack:
        for index, block in layers.items():
            stack.enter_context(_watching(block, index, routers))
        yield routers


@contextmanager
def _watching(block: Any, layer: int, routers: Routers) -> Iterator[None]:
    own = getattr(block, "route", None)
    logits: list[torch.Tensor] = []

    def stock(module: Any, args: Any, output: Any) -> Any:
        said, weights, experts = output
        return said, *routers.route(layer, said, weights, experts, module.norm_topk_prob)

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = own(x)  # type: ignore[misc]
        return routers.route(layer, logits.pop(), weights, experts, block.normalised)

    def take(module: Any, args: Any, output: torch.Tensor) -> None:
        logits[:] = [output]

    before = vars(block).get("route")
    handle = block.gate.register_forward_hook(stock if own is None else take)
    try:
        if own is not None:
            block.route = ours
        yield
    finally:
        handle.remove()
        if own is not None:
            vars(block).pop("route")
        if before is not None:
            block.route = before
