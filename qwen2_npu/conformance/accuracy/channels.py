"""Every channel of every product of 8-bit weights, given its own inputs, held against float64.

A scale belongs to one output channel. Where one of them is wrong, that channel errs by the same part of its value in
every token, and the others do not err at all: in the RMS error of the logits, and in that of the product as a whole, it
is hidden by rounding as soon as there are many channels. In its own channel it is not.

So each product of our model is compared with the float64 product of **what it was given itself** and the exact weights:
nothing that happened before it counts. Its noise is the error of the stock model's product of the same input.

**The bound.** Few tokens tell a channel's noise with little certainty, so it is at least the one that is usual in the
product: there is nothing about one channel that makes its rounding smaller, relative to its values. The RMS errors of n
tokens differ by a factor of f by chance with a probability of about f^(-n), so the factor allowed is 1.5 × 10^(12/n):
10^-12 for each of a million channels.

**Rows in int8** that a fused operator hands on, a norm's or the MLP's, are compared with the float64 values of what it
was given, in steps of each row. Rounding to the nearest integer errs by half a step at most, and by 0.29 in the RMS,
which is their noise. The MLP of 8-bit activations shows no product of gate and up; they are computed of what its
operator is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from qwen2_npu.conformance.accuracy.intermediates import IN_INT8, Point
from qwen2_npu.conformance.accuracy.locate_error import ErrorLocation
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, Array, ErrorRatio, root_mean, rounded
from qwen2_npu.conformance.accuracy.quantised import LARGEST, InputRounding, kept_in_int8, widths_of_parts
from qwen2_npu.conformance.accuracy.stock import exact

SHAPE = "four"
"""The batch that channels are judged on: the one of most tokens."""
CHANCE = 12
"""The decimal logarithm of how unlikely a right channel is to be found wrong, negated."""
TINY = float(np.finfo(np.float64).tiny)
ROUNDING = 12**-0.5
"""RMS error of rounding to the nearest integer."""

ATTENTION, MLP = "input_layernorm", "post_attention_layernorm"
INPUT_OF: dict[str, tuple[str, str]] = {
    "q_proj": ("self_attn.q_proj", ATTENTION),
    "k_proj": ("self_attn.k_proj", ATTENTION),
    "v_proj": ("self_attn.v_proj", ATTENTION),
    "o_proj": ("self_attn.o_proj", "attention"),
    "gate_proj": ("mlp.gate_proj", MLP),
    "up_proj": ("mlp.up_proj", MLP),
    "down_proj": ("mlp.down_proj", "mlp activation"),
}
"""Point that a product gives -> its stock module within a layer, and the point that goes into it."""


@dataclass(frozen=True)
class LayerOfBoth:
    """A layer of the stock model and of its float64 self.

    Attributes:
        number: in the whole model.
        stock, true: models that have it, as number ``index``.
        config: of the whole model.
        rounding: what 8-bit activations are; None where ours has none.
        ranks: how many share ours.
    """

    number: int
    stock: Any
    true: Any
    index: int
    config: Any
    rounding: InputRounding | None
    ranks: int

    @torch.no_grad()
    def first_wrong(self, points: Sequence[Point], dtype: torch.dtype) -> ErrorLocation | None:
        """The worst channel of the first product, or the first int8 rows, that are beyond their bound.

        Args:
            points: of our model, in this layer, in order of execution.
        """
        by_name = {point.name: point for point in points}
        for point in points:
            if point.name in INPUT_OF:
                expected, stock = self._product(point.name, by_name, dtype)
                found = _worst(point, *channel_errors(point.values, stock, expected, dtype))
            elif point.name.endswith(IN_INT8):
                found = _worst(point, *_int8_errors(point.values, self._row(point.name, by_name)))
            else:
                continue
            if found is not None:
                return found
        return None

    def _module(self, model: Any, name: str) -> Any:
        return model.model.layers[self.index].get_submodule(name)

    def _product(self, name: str, by_name: dict[str, Point], dtype: torch.dtype) -> tuple[Array, Array]:
        """In float64, and by the stock model, of what ours was given."""
        module, source = INPUT_OF[name]
        true, stock = self._module(self.true, module), self._module(self.stock, module)
        given = by_name.get(source + IN_INT8)
        rows = torch.from_numpy((given or by_name[source]).values)
        sides = [rows.double(), rows.to(stock.weight.device, dtype)]
        whole = f"model.layers.{self.number}.{module}"
        widths = widths_of_parts(whole, self.config, self.ranks)
        if given is None and self.rounding is not None and self.rounding.covers(whole):
            sides = [kept_in_int8(side, widths) for side in sides]
        expected = F.linear(sides[0], true.weight.double(), None if true.bias is None else true.bias.double())
        if not widths:
            found = F.linear(sides[1], stock.weight, stock.bias)
        else:  # what ranks add up is rounded on each of them
            parts = zip(sides[1].split(widths, dim=-1), stock.weight.split(widths, dim=-1), strict=True)
            found = reduce(torch.add, (F.linear(side, weight) for side, weight in parts))
        return expected.numpy(), found.double().cpu().numpy()

    def _row(self, name: str, by_name: dict[str, Point]) -> Array:
        """What is to be kept in int8, in float64, of what the operator was given."""
        source = name.removesuffix(IN_INT8)
        if source in (ATTENTION, MLP):
            with exact(self.true):
                normed = self._module(self.true, source)(_wide(by_name[f"residual into {source}"]).to(self.true.dtype))
            return np.asarray(normed.double().numpy())
        gate, up = (_wide(by_name[part]) for part in ("gate_proj", "up_proj"))
        return np.asarray((F.silu(gate) * up).numpy())


def channel_errors(ours: Array, stock: Array, true: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """(N,) each: the RMS error of each channel, and its noise. In units of each token's RMS: no token counts more than
    another."""
    if ours.shape != true.shape:
        return np.full(1, np.inf), np.ones(1)
    each = np.sqrt(np.mean(np.square(true), axis=1, keepdims=True))
    each[each == 0] = 1
    size = _rms(true / each)
    noise = np.maximum(_rms((stock - true) / each), _rms((rounded(true, dtype) - true) / each))
    usual = root_mean(np.square(noise)) / max(root_mean(np.square(size)), TINY) * size
    return _rms((ours - true) / each), np.maximum(noise, usual)


def _int8_errors(ours: Array, true: Array) -> tuple[Array, Array]:
    largest = np.abs(true).max(axis=1, keepdims=True)
    errors = _rms((ours - true) / np.where(largest == 0, 1, largest / LARGEST))
    return errors, np.full_like(errors, ROUNDING)


def _worst(point: Point, error: Array, noise: Array) -> ErrorLocation | None:
    """The channel that is farthest beyond its bound; all together, where most are. None where none is."""
    allowed = RMS_FACTOR * 10 ** (CHANCE / len(point.values))
    beyond = ~(error <= allowed * noise)  # NaN is beyond
    if not beyond.any():
        return None
    if beyond.mean() > 0.5:
        whole = ErrorRatio(root_mean(np.square(error)), root_mean(np.square(noise)), 0.0)
        return ErrorLocation("prefill", point.layer, point.name, point.operators, whole, allowed=allowed)
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = int(np.where(beyond, error / noise, 0).argmax())  # the first NaN, where there is one
    one = ErrorRatio(float(error[worst]), float(noise[worst]), 0.0)
    return ErrorLocation("prefill", point.layer, point.name, point.operators, one, channel=worst, allowed=allowed)


def _wide(point: Point) -> torch.Tensor:
    return torch.from_numpy(point.values).double()


def _rms(values: Array) -> Array:
    found: Array = np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=0))
    return found
