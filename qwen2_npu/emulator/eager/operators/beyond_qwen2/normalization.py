"""Layer, RMS and group norms fused with their neighbours, and their gradients. Computed in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.eager.gradients import gradients

Tensor = torch.Tensor


def rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x, in its dtype, and by gamma, in fp32."""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    leading = tuple(range(x.dim() - gamma.dim()))
    normed = x.float() * rstd
    scaled = grad.float() * gamma.float()
    dx = rstd * (scaled - normed * (scaled * normed).mean(dims, keepdim=True))
    dgamma = grad.float() * normed
    return dx.to(x.dtype), dgamma.sum(leading) if leading else dgamma


def gemma_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x · rstd · (1 + gamma), rstd)"""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    rstd = (x.float().square().mean(dims, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * (1 + gamma.float())).to(x.dtype), rstd


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    rstd = (variance + epsilon).rsqrt()
    return (x - mean) * rstd * gamma.float() + beta.float(), mean, rstd


def add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5, additional_output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(layer_norm(x1 + x2), mean, rstd, x1 + x2); the sum is empty unless ``additional_output``."""
    total = x1.float() + x2.float()
    y, mean, rstd = _layer_norm(total, gamma, beta, epsilon)
    return y.to(x1.dtype), mean, rstd, total.to(x1.dtype) if additional_output else x1.new_empty(0)


def add_layer_norm_backward(
    grad: Tensor | None, x1: Tensor, x2: Tensor, rstd: Tensor, mean: Tensor, gamma: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x1, x2, gamma, beta."""
    grad = torch.zeros_like(x1) if grad is None else grad
    dx, dgamma, dbeta = _layer_norm_backward(grad, x1.float() + x2.float(), gamma, mean, rstd)
    if grad_sum is not None and grad_sum.numel():
        dx = dx + grad_sum.float()
    return dx.to(x1.dtype), dx.to(x2.dtype), dgamma, dbeta


def _layer_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    leading = tuple(range(x.dim() - gamma.dim()))
    normed, grad = (x - mean) * rstd, grad.float()
    scaled = grad * gamma.float()
    dx = rstd * (scaled - scaled.mean(dims, keepdim=True) - normed * (scaled * normed).mean(dims, keepdim=True))
    dgamma, dbeta = grad * normed, grad
    return dx, dgamma.sum(leading) if leading else dgamma, dbeta.sum(leading) if leading else dbeta.clone()


def deep_norm(
    x: Tensor, gx: Tensor, beta: Tensor, gamma: Tensor, alpha: float = 0.3, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, rstd, layer_norm(alpha · x + gx))"""
    y, mean, rstd = _layer_norm(alpha * x.float() + gx.float(), gamma, beta, epsilon)
    return mean, rstd, y.to(x.dtype)


def deep_norm_backward(
    grad: Tensor, x: Tensor, gx: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, alpha: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, gx, beta, gamma."""
    dsum, dgamma, dbeta = _layer_norm_backward(grad, alpha * x.float() + gx.float(), gamma, mean, rstd)
    return (alpha * dsum).to(x.dtype), dsum.to(gx.dtype), dbeta, dgamma


def layer_norm_eval(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def layer_norm_grad(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, [True] * 3)


def group_norm_swish(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None = 1e-5,
    swish_scale: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y · sigmoid(swish_scale · y) of y = group_norm(x), mean, rstd); mean and rstd are (N, groups)."""
    eps, swish_scale = 1e-5 if eps is None else eps, 1.0 if swish_scale is None else swish_scale
    grouped = x.float().reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    rstd = (variance + eps).rsqrt()
    gamma, beta = (None if value is None else value.float() for value in (weight, bias))
    y = F.group_norm(x.float(), groups, gamma, beta, eps)
    kind = x.dtype if weight is None else weight.dtype
    return (y * torch.sigmoid(swish_scale * y)).to(x.dtype), mean.to(kind), rstd.to(kind)


def group_norm_silu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_swish(x, groups, weight, bias, eps)


def group_norm_swish_grad(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mask: Sequence[bool],
    swish_scale: float | None = 1.0,
) -> tuple[Tensor | None, ...]:
    """Gradients by x, weight, bias. Mean and rstd are constants of x, as the forward left them."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x.float(), groups, weight.float(), bias.float(), _epsilon(x, groups, rstd))
        return y * torch.sigmoid((1.0 if swish_scale is None else swish_scale) * y)

    return gradients(forward, (x, weight, bias), grad, mask)


def _epsilon(x: Tensor, groups: int, rstd: Tensor) -> float:
    """The epsilon that ``rstd`` was made with; the operator is not told."""
    variance = x.detach().double().reshape(x.shape[0], groups, -1).var(-1, correction=0)
    return max(0.0, float((rstd.double().pow(-2) - variance).median()))


TABLE: dict[str, Callable[..., Any]] = {
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_gemma_rms_norm": gemma_rms_norm,
    "npu_add_layer_norm": add_layer_norm,
    "npu_add_layer_norm_backward": add_layer_norm_backward,
    "npu_deep_norm": deep_norm,
    "npu_deep_norm_backward": deep_norm_backward,
    "npu_layer_norm_eval": layer_norm_eval,
    "npu_layernorm_grad": layer_norm_grad,
    "npu_group_norm_silu": group_norm_silu,
    "npu_group_norm_swish": group_norm_swish,
    "npu_group_norm_swish_grad": group_norm_swish_grad,
}
