"""Activations and fused softmaxes, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qwen2_npu import ops
from qwen2_npu.emulator.eager.gradients import gradient
from qwen2_npu.emulator.eager.operators.linear import fast_gelu

Tensor = torch.Tensor

MASKED = -10000.0
"""What ``npu_scaled_masked_softmax`` puts at masked positions."""


def gelu_mul(x: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(first half of the last dimension) · second half."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate=approximate) * up


def geglu(x: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    """(one half · gelu(other half), gelu(other half)); ``approximate`` 1 is the tanh formula."""
    left, right = x.chunk(2, dim)
    active, linear = (left, right) if activate_left else (right, left)
    active = F.gelu(active, approximate="tanh" if approximate else "none")
    return linear * active, active


def _geglu_backward(
    grad: Tensor, x: Tensor, gelu: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> Tensor:
    return gradient(lambda value: geglu(value, dim, approximate, activate_left)[0], x, grad)


def clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """g · sigmoid(alpha g) · (u + bias), g clamped from above and u from both sides by ``limit``.

    ``interleaved``: g and u are the even and odd elements along ``dim``, else its halves.
    """
    if group_index is not None:
        raise NotImplementedError("npu_clipped_swiglu: group_index is not emulated")
    if interleaved and dim not in (-1, x.dim() - 1):
        raise NotImplementedError(f"npu_clipped_swiglu: interleaved with dim={dim} is not emulated")
    gate, up = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim)
    gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + bias)).to(x.dtype)


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    """softmax over the last dimension of ``x · scale``, with −10000 where ``mask`` is True.

    ``fixed_triu_mask``: the strict upper triangle is masked instead.
    """
    scores = (x.float() * scale).masked_fill(_mask(x, mask, fixed_triu_mask), MASKED)
    return torch.softmax(scores, -1).to(x.dtype)


def scaled_masked_softmax_backward(
    grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool
) -> Tensor:
    y32, grad32 = y.float(), grad.float()
    dx = (grad32 - (grad32 * y32).sum(-1, keepdim=True)) * y32 * scale
    return dx.masked_fill(_mask(y, mask, fixed_triu_mask), 0).to(y.dtype)


def _mask(x: Tensor, mask: Tensor, triangle: bool) -> Tensor:
    return torch.ones(x.shape[-2:], dtype=torch.bool).triu(1) if triangle else mask.bool()


def attn_softmax_backward_(x: Tensor, grad: Tensor, values: Tensor) -> Tensor:
    """Overwrites ``x`` with the gradient of softmax, of which ``values`` is the result."""
    return x.copy_((grad - (grad * values).sum(-1, keepdim=True)) * values)


def backward_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(grad, x, options…) -> gradient of ``function(x, options…)``."""

    def backward(grad: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return gradient(lambda value: function(value, *args, **kwargs), x, grad)

    return backward


TABLE: dict[str, Callable[..., Any]] = {
    "fast_gelu": fast_gelu,
    "npu_fast_gelu": fast_gelu,
    "npu_fast_gelu_backward": backward_of(fast_gelu),
    "npu_gelu": F.gelu,
    "npu_gelu_backward": backward_of(F.gelu),
    "npu_gelu_mul": gelu_mul,
    "npu_silu": F.silu,
    "npu_silu_": lambda x: F.silu(x, inplace=True),
    "npu_silu_backward": lambda grad, x, _: backward_of(F.silu)(grad, x),
    "npu_mish": F.mish,
    "npu_mish_backward": backward_of(F.mish),
    "npu_swiglu_backward": backward_of(ops.kernels["npu_swiglu"]),
    "npu_geglu": geglu,
    "npu_geglu_grad": _geglu_backward,
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_scaled_masked_softmax": scaled_masked_softmax,
    "npu_scaled_masked_softmax_backward": scaled_masked_softmax_backward,
    "npu_attn_softmax_": lambda x: x.copy_(torch.softmax(x, -1)),
    "npu_attn_softmax_backward_": attn_softmax_backward_,
}
