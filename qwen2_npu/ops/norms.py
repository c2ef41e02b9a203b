"""RMS normalisation: npu_rms_norm and npu_add_rms_norm, each with the 910B's own rounding order.

The two differ. npu_rms_norm keeps everything in fp32 and rounds once. npu_add_rms_norm rounds the sum, then the
normalised value **before** gamma, then the product: the order in which the eager Hugging Face model rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid


def _check_gamma(op: str, name: str, x: Tensor, gamma: Tensor) -> list[int]:
    """The dimensions of `x`, the argument `name`, to normalise over: as many trailing ones as gamma has."""
    check_float(op, name, x)
    rank = gamma.dim()
    if not 1 <= rank <= x.dim() or gamma.shape != x.shape[x.dim() - rank :]:
        raise invalid(op, "gamma", gamma, f"the trailing dimensions of {name}, whose shape is {tuple(x.shape)}")
    return list(range(-rank, 0))


def _reciprocal_rms(x: Tensor, dims: list[int], epsilon: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = cast(x · rstd · gamma), rstd = 1 / sqrt(mean(x²) + epsilon), all in fp32 with one final rounding.

    Args:
        input: (..., *gamma.shape), float32, bfloat16 or float16.
        gamma: the trailing shape of `input`, in its dtype or in float32.

    Returns:
        y like `input`; rstd float32, (..., 1) with a 1 for every dimension of gamma.

    Raises:
        ValueError: dtype or shape of `gamma` does not fit.
    """
    dims = _check_gamma("npu_rms_norm", "input", input, gamma)
    if gamma.dtype != torch.float32:
        check_same_dtype("npu_rms_norm", input, gamma=gamma)
    x = input.float()
    rstd = _reciprocal_rms(x, dims, epsilon)
    return (x * rstd).mul_(gamma.float()).to(input.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """x = x1 + x2 rounded to the dtype; y = cast(x · rstd) · gamma, where rstd comes from the rounded x.

    Args:
        x1, x2: (..., *gamma.shape), same shape and dtype.
        gamma: the trailing shape of `x1`, same dtype.

    Returns:
        y and x like `x1`; rstd float32 with a 1 for every dimension of gamma. In the order (y, rstd, x).

    Raises:
        ValueError: shapes or dtypes differ.
    """
    dims = _check_gamma("npu_add_rms_norm", "x1", x1, gamma)
    check_same_dtype("npu_add_rms_norm", x1, x2=x2, gamma=gamma)
    if x1.shape != x2.shape:
        raise invalid("npu_add_rms_norm", "x2", x2, f"the shape of x1, {tuple(x1.shape)}")
    x = x1 + x2
    wide = x.float()
    rstd = _reciprocal_rms(wide, dims, epsilon)
    # A product of two bf16 (or two fp16) values is exact in fp32, so multiplying gamma in the dtype rounds as the
    # device does for both: once.
    return (wide * rstd).to(x.dtype).mul_(gamma), rstd, x
