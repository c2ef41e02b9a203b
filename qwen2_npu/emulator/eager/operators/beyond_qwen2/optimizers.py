"""Fused optimiser steps, and the overflow checks of mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor


def apply_adam(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    use_locking: bool | None,
    use_nesterov: bool | None,
    *,
    out: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Adam as TensorFlow has it, on ``out`` = (var, m, v). The powers are those of this step."""
    var, m, v = out
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step = lr * (1 - beta2_power) ** 0.5 / (1 - beta1_power)
    ahead = m * beta1 + grad * (1 - beta1) if use_nesterov else m
    var.addcdiv_(ahead, v.sqrt() + epsilon, value=-step)
    return var, m, v


def apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """AdamW on ``out`` = (var, m, v). The powers are those of the step before.

    ``amsgrad``: v keeps its maximum with ``max_grad_norm``.
    """
    var, m, v = out
    grad = -grad if maximize else grad
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if amsgrad:
        if max_grad_norm is None:
            raise ValueError("npu_apply_adam_w: amsgrad=True needs max_grad_norm")
        torch.maximum(v, max_grad_norm, out=v)
    denominator = (v / (1 - beta2_power * beta2)).sqrt() + epsilon
    var.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1_power * beta1))
    return var, m, v


def bert_apply_adam(
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: float,
    global_grad_norm: float,
    weight_decay: float,
    step_size: float | None = None,
    adam_mode: int = 0,
    *,
    out: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """BERT's Adam on ``out`` = (var, m, v): no bias correction, the gradient clipped by its global norm.

    ``adam_mode`` 1 (mbert) is not emulated.
    """
    if adam_mode:
        raise NotImplementedError(f"npu_bert_apply_adam: adam_mode={adam_mode} is not emulated")
    var, m, v = out
    if max_grad_norm > 0 and global_grad_norm > max_grad_norm:
        grad = grad * (max_grad_norm / global_grad_norm)
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = m / (v.sqrt() + epsilon) + weight_decay * var
    var.add_(update, alpha=-lr)
    return var, m, v


def non_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether any gradient holds an infinity or NaN."""
    return any(not bool(torch.isfinite(gradient).all()) for gradient in gradients)


TABLE: dict[str, Callable[..., Any]] = {
    "npu_apply_adam.out": apply_adam,
    "npu_apply_adam_w.out": apply_adam_w,
    "npu_bert_apply_adam.out": bert_apply_adam,
    "_amp_foreach_non_finite_check": non_finite,
}
