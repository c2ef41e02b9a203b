"""Rotary position embedding: the gradient of ``npu_rotary_mul`` and the interleaved form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.emulator.eager.gradients import gradients

Tensor = torch.Tensor


def rotate(x: Tensor, mode: str) -> Tensor:
    """(−second half, first half) of the last dimension, or of every pair."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    if mode == "interleave":
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    raise ValueError(f"rotary_mode={mode!r}; one of half, interleave is known")


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, mode: str = "half") -> Tensor:
    return x * cos + rotate(x, mode) * sin


def rotary_mul_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, ...]:
    """Gradients by x, cos, sin, summed in fp32."""

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary_mul(x.float(), cos.float(), sin.float(), rotary_mode)

    return gradients(forward, (x, cos, sin), grad)  # type: ignore[return-value]


def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (even, odd) are first brought to halves, then rotated as halves. ``x`` (B, N, S, D)."""
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1).float()
    return rotary_mul(halves, cos.float(), sin.float()).to(x.dtype)


TABLE: dict[str, Callable[..., Any]] = {
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_interleave_rope": interleave_rope,
}
