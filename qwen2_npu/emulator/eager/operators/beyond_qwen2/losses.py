"""Losses and their gradients. ``reduction`` as a number: 0 none, 1 mean, 2 sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.eager.gradients import gradient, gradients

Tensor = torch.Tensor

REDUCTION = {0: "none", 1: "mean", 2: "sum"}


def l1_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    return gradient(lambda value: F.l1_loss(value, target, reduction=REDUCTION[reduction]), x, grad)


def kl_div_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False) -> Tensor:
    return _kl_div(grad, x, target, reduction, log_target, 0)


def kl_div_target_backward(
    grad: Tensor, x: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False
) -> Tensor:
    return _kl_div(grad, x, target, reduction, log_target, 1)


def _kl_div(grad: Tensor, x: Tensor, target: Tensor, reduction: int, log_target: bool, which: int) -> Any:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return torch.kl_div(x, target, reduction, log_target=log_target)

    return gradients(loss, (x, target), grad, [which == 0, which == 1])[which]


def bce_with_logits_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: int
) -> Tensor:
    def loss(value: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            value, target, weight, pos_weight=pos_weight, reduction=REDUCTION[reduction]
        )

    return gradient(loss, x, grad)


def softmax_cross_entropy(x: Tensor, labels: Tensor) -> Tensor:
    """−Σ labels · log_softmax(x) of every row, fp32, (N,). ``labels`` are (N, C)."""
    return -(labels.float() * F.log_softmax(x.float(), -1)).sum(-1)


def softmax_cross_entropy_backward(grad: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The device's formula, which takes each row of ``labels`` to sum to 1."""
    return (grad.float().unsqueeze(-1) * (torch.softmax(x.float(), -1) - labels.float())).to(x.dtype)


def _reduce(loss: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return (loss.sum() / weights.sum() if reduction == "mean" else loss.sum()).view(1)


def _cross_entropy(
    log_prob: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, smoothing: float
) -> Tensor:
    if reduction not in REDUCTION.values():
        raise ValueError(f"npu_cross_entropy_loss: reduction={reduction!r}; one of mean, sum, none is known")
    per_class = torch.ones(log_prob.shape[-1]) if weight is None else weight.float()
    live = target != ignore_index
    safe = torch.where(live, target, 0)
    weights = per_class[safe] * live
    loss = -log_prob.gather(-1, safe.unsqueeze(-1)).squeeze(-1) * weights
    if smoothing:
        smooth = -(log_prob * per_class).sum(-1) * live / log_prob.shape[-1]
        loss = (1 - smoothing) * loss + smoothing * smooth
    return _reduce(loss, weights, reduction)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_softmax(x), empty, empty): z-loss is not enabled on the device either.

    Args:
        x: (N, C). target: (N,), int64.

    Returns:
        The loss is (N,) for reduction "none", else (1,).
    """
    if return_zloss or lse_square_scale_for_zloss:
        raise NotImplementedError("npu_cross_entropy_loss: z-loss is not supported")
    log_prob = F.log_softmax(x.float(), -1)
    loss = _cross_entropy(log_prob, target, weight, reduction, ignore_index, label_smoothing)
    return loss.to(x.dtype), log_prob.to(x.dtype), x.new_empty(0), x.new_empty(0)


def cross_entropy_backward(
    grad: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_zloss: Tensor | None = None,
    lse_for_zloss: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
) -> Tensor:
    """Gradient by x. The logarithms of probabilities serve as logits: they differ by a constant per row."""

    def loss(logits: Tensor) -> Tensor:
        return _cross_entropy(
            F.log_softmax(logits.float(), -1), target, weight, reduction, ignore_index, label_smoothing
        )

    return gradient(loss, log_prob, grad)


TABLE: dict[str, Callable[..., Any]] = {
    "l1_loss_backward": l1_loss_backward,
    "kl_div_backward": kl_div_backward,
    "kl_div_target_backward": kl_div_target_backward,
    "npu_binary_cross_entropy_with_logits_backward": bce_with_logits_backward,
    "npu_softmax_cross_entropy_with_logits": softmax_cross_entropy,
    "npu_softmax_cross_entropy_with_logits_backward": softmax_cross_entropy_backward,
    "npu_cross_entropy_loss": cross_entropy,
    "npu_cross_entropy_loss_backward": cross_entropy_backward,
}
