"""8-bit weights as numbers: made of floating-point ones and back, four in an int32 and back.

A weight (N, K) is ``integers · scale``: int8, and one scale per row. In files of the format "pack-quantized" an int32
holds four integers of a row, each plus 128, the first in its lowest byte; the last one of a row is filled up with zero
bits. The bits are those of the package compressed-tensors.
"""

from __future__ import annotations

import torch

LARGEST = 127
"""Integers that are made here are from -127 to 127. Those of others may be -128."""

PER_WORD = 4
"""Integers in an int32."""

_OFFSET = 128


def words(columns: int) -> int:
    """How many int32 hold a row of so many integers."""
    return -(-columns // PER_WORD)


def pack(integers: torch.Tensor) -> torch.Tensor:
    """int8 (N, K) as int32 (N, ceil(K / 4))."""
    codes = integers.contiguous().view(torch.uint8) ^ _OFFSET  # in two's complement: plus 128
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % PER_WORD)).contiguous().view(torch.int32)


def unpack(packed: torch.Tensor, columns: int, skipped: int = 0) -> torch.Tensor:
    """int32 (N, words) as int8 (N, columns).

    Args:
        skipped: integers of each row before the first that is wanted.
    """
    codes = packed.contiguous().view(torch.uint8)[:, skipped : skipped + columns]
    return (codes ^ _OFFSET).view(torch.int8)


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """The scales (N, 1) of floating-point numbers (N, K), in their dtype.

    The largest magnitude of a row / 127. Where that would be 0 it is the dtype's epsilon, as compressed-tensors has it.
    Of a row that holds NaN or infinity it is one of them.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (weight.abs().amax(dim=1, keepdim=True).to(wide) / LARGEST).to(weight.dtype)
    return scale.masked_fill(scale == 0, torch.finfo(weight.dtype).eps)


def integers_of(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The integers (N, K) that stand for ``weight`` with that scale, as it was rounded: the nearest, half to even."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    quotient = weight.to(wide) / scale.to(wide)
    return quotient.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def dequantise(integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``integers · scale`` rounded once to ``dtype``, in which the scale is as well, as all of a model is."""
    wide = torch.promote_types(dtype, torch.float32)
    return (integers.to(wide) * scale.to(dtype).to(wide)).to(dtype)
