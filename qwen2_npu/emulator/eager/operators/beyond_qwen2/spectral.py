"""Gradients of Fourier transforms and of renorm, through PyTorch's own formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen2_npu.emulator.eager.gradients import autograd_again, gradient

Tensor = torch.Tensor


def _vjp(function: Callable[[Tensor], Tensor], at: Tensor, grad: Tensor) -> Tensor:
    with autograd_again():
        leaf = at.detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]


def r2c_backward(grad: Tensor, dim: Sequence[int], normalization: int, onesided: bool, last_dim_size: int) -> Tensor:
    shape = list(grad.shape)
    shape[dim[-1]] = last_dim_size
    real = torch.zeros(shape, dtype=grad.real.dtype)
    return _vjp(lambda x: torch._fft_r2c(x, list(dim), normalization, onesided), real, grad)


def c2r_backward(grad: Tensor, dim: Sequence[int], normalization: int) -> Tensor:
    last = grad.shape[dim[-1]]
    shape = list(grad.shape)
    shape[dim[-1]] = last // 2 + 1
    spectrum = torch.zeros(shape, dtype=grad.dtype.to_complex())
    return _vjp(lambda x: torch._fft_c2r(x, list(dim), normalization, last), spectrum, grad)


def stft_backward(
    grad: Tensor,
    x: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        return torch.ops.aten.stft(x, n_fft, hop_length, win_length, window, normalized, onesided, return_complex)

    return _vjp(forward, x, grad)


def renorm_backward(grad: Tensor, x: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    return gradient(lambda value: torch.renorm(value, p, dim, maxnorm), x, grad)


TABLE: dict[str, Callable[..., Any]] = {
    "fft_r2c_backward": r2c_backward,
    "fft_c2r_backward": c2r_backward,
    "stft_backward": stft_backward,
    "npu_renorm_backward": renorm_backward,
}
