"""Every channel of every product of 8-bit weights, held against float64.

A scale belongs to one output channel. Where one of them is wrong, that channel errs by the same part of its value in
every token, and the others do not err at all: in the RMS error of the logits, and in that of the product as a whole, it
is hidden by rounding as soon as there are many channels. In its own channel it is not.

**The bound.** The noise of a channel is the stock model's RMS error in it over the tokens of a prefill, or that of one
rounding, as everywhere. But few tokens tell a channel's noise with little certainty, so it is at least the one that is
usual in the product: there is nothing about one channel that makes its rounding smaller, relative to its values. The
RMS errors of n tokens differ by a factor of f by chance with a probability of about f^(-n), so the factor allowed is
1.5 × 10^(12/n): 10^-12 for each of a million channels.

The fused MLP of 8-bit activations shows no product of gate and up; they are computed of what its operator is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qwen2_npu.conformance.accuracy.intermediates import PassRecorder, Point
from qwen2_npu.conformance.accuracy.locate_error import ErrorLocation, first_beyond
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, Array, ErrorRatio, root_mean, rounded

SHAPE = "four"
"""The batch that channels are judged on: the one of most tokens."""
CHANCE = 12
"""The decimal logarithm of how unlikely a right channel is to be found wrong, negated."""

PRODUCTS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def first_channel_beyond(
    ours: Sequence[Point], stock: PassRecorder, true: PassRecorder, dtype: torch.dtype, step: int = 0
) -> ErrorLocation | None:
    """The worst channel of the first product that has one beyond its bound; or, where a tensor before that product is
    beyond its own, or most channels are, that tensor. Arguments as of ``first_beyond``."""
    stock_points, true_points = stock.by_place(), true.by_place()
    for number, point in enumerate(ours):
        place = (point.layer, point.name)
        if point.name not in PRODUCTS or not (place in stock_points and place in true_points):
            continue
        if point.values.shape != true_points[place].values.shape:
            return first_beyond([point], stock, true, dtype, step)
        error, noise = channel_errors(point.values, stock_points[place].values, true_points[place].values, dtype)
        allowed = RMS_FACTOR * 10 ** (CHANCE / len(point.values))
        beyond = ~(error <= allowed * noise)  # NaN is beyond
        if beyond.any():
            seen = ours[: number + (beyond.mean() > 0.5)]
            if (whole := first_beyond(seen, stock, true, dtype, step)) is not None:
                return whole
            worst = int(np.where(beyond, np.nan_to_num(error, nan=np.inf) / np.maximum(noise, 1e-300), 0).argmax())
            ratio = ErrorRatio(float(error[worst]), float(noise[worst]), 0.0)
            path = "prefill" if step == 0 else f"decode step {step - 1}"
            return ErrorLocation(path, point.layer, point.name, point.operators, ratio, channel=worst, allowed=allowed)
    return None


def channel_errors(ours: Array, stock: Array, true: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """(N,) each: the RMS error of each channel, and its noise."""
    size = _rms(true)
    floor = _rms(rounded(true.astype(np.float64), dtype) - true)
    noise = np.maximum(_rms(stock - true), floor)
    usual = root_mean(np.square(noise)) / max(root_mean(np.square(size)), 1e-300) * size
    return _rms(ours - true), np.maximum(noise, usual)


def _rms(values: Array) -> Array:
    found: Array = np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=0))
    return found
