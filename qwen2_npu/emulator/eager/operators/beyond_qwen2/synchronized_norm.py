"""The pieces of batch norm that SyncBatchNorm puts together across cards. Channels are dimension 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor


def _over_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    """A per-channel tensor, broadcastable to ``like``."""
    return value.float().view(1, -1, *[1] * (like.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(biased variance + eps)) per channel, fp32."""
    variance, mean = torch.var_mean(x.float(), _over_channels(x), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_reduce(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(sum, sum of squares) per channel, fp32."""
    wide = x.float()
    return wide.sum(_over_channels(x)), wide.square().sum(_over_channels(x))


def batch_norm_gather_stats(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of all cards' samples from each card's; moves the running statistics.

    Args:
        mean, invstd: (cards, channels). counts: (cards,).
    """
    weights = counts.double().view(-1, 1)
    total = weights.sum()
    whole_mean = (mean.double() * weights).sum(0) / total
    second = (invstd.double().pow(-2) - eps + (mean.double() - whole_mean).square()) * weights
    return _finish(whole_mean, second.sum(0), total, running_mean, running_var, momentum, eps)


def batch_norm_gather_stats_update(
    x: Tensor,
    sums: Tensor,
    squares: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same from each card's ``batch_norm_reduce``."""
    total = counts.double().sum()
    whole_mean = sums.double().sum(0) / total
    second = squares.double().sum(0) - total * whole_mean.square()
    return _finish(whole_mean, second, total, running_mean, running_var, momentum, eps)


def _finish(
    mean: Tensor,
    second_moment: Tensor,
    total: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_((second_moment / (total - 1)).to(running_var.dtype), alpha=momentum)
    return mean.float(), (second_moment / total + eps).rsqrt().float()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    """(x − mean) · invstd · weight + bias"""
    y = (x.float() - _shaped(mean, x)) * _shaped(invstd, x)
    if weight is not None:
        y = y * _shaped(weight, x)
    return (y if bias is None else y + _shaped(bias, x)).to(x.dtype)


def batch_norm_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sum of dy, sum of dy · (x − mean), gradient by weight, gradient by bias) per channel."""
    wide, over = grad.float(), _over_channels(x)
    sum_dy = wide.sum(over)
    sum_dy_xmu = (wide * (x.float() - _shaped(mean, x))).sum(over)
    kind = mean.dtype if weight is None else weight.dtype
    by_weight = (sum_dy_xmu * invstd).to(kind) if weight_g else None
    return sum_dy, sum_dy_xmu, by_weight, sum_dy.to(kind) if bias_g else None


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """Gradient by x; the sums are those of all cards, ``count`` holds each card's samples."""
    total = count.sum().float()
    centred = x.float() - _shaped(mean, x)
    dx = grad.float() - _shaped(sum_dy / total, x) - centred * _shaped(invstd.square() * sum_dy_xmu / total, x)
    scale = invstd if weight is None else invstd * weight.float()
    return (dx * _shaped(scale, x)).to(x.dtype)


TABLE: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": batch_norm_stats,
    "batch_norm_reduce": batch_norm_reduce,
    "batch_norm_gather_stats_with_counts": batch_norm_gather_stats,
    "batch_norm_gather_stats_update": batch_norm_gather_stats_update,
    "batch_norm_elemt": batch_norm_elemt,
    "batch_norm_elemt.out": lambda *args, out: out.copy_(batch_norm_elemt(*args)),
    "batch_norm_backward_reduce": batch_norm_backward_reduce,
    "batch_norm_backward_elemt": batch_norm_backward_elemt,
}
