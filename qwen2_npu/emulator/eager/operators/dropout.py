"""Dropout as torch_npu has it: masks of one bit per element, padded to 128, and masks of one byte.

Functions with ``draws`` set get ``generator``: a function that gives a CPU generator, and moves the card's own on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

Tensor = torch.Tensor
Draw = Callable[[], torch.Generator]

ALIGNMENT = 128
"""Bits that a mask is a multiple of."""


def drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark ``function`` as one that draws random numbers."""
    function.draws = True  # type: ignore[attr-defined]
    return function


def keep_mask(shape: Sequence[int], keep: float, generator: torch.Generator) -> Tensor:
    """bool: True with probability ``keep``."""
    return torch.empty(tuple(shape), dtype=torch.float32).uniform_(generator=generator) < keep


def pack(mask: Tensor) -> Tensor:
    """One bit per element, the first in the lowest, as uint8."""
    bits = torch.zeros(-(-mask.numel() // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
    bits[: mask.numel()] = mask.reshape(-1)
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of ``shape`` that ``pack`` packed."""
    bits = packed.reshape(-1).view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(-1)[: prod(shape)].view(tuple(shape)).bool()


def _apply(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x / (1 − p) where kept, else 0."""
    return torch.where(keep, x / (1 - p) if p < 1 else x, 0).to(x.dtype)


@drawing
def dropout(x: Tensor, p: float, *, generator: Draw) -> tuple[Tensor, Tensor]:
    keep = keep_mask(x.shape, 1 - p, generator())
    return _apply(x, keep, p), pack(keep)


@drawing
def byte_dropout(x: Tensor, p: float, *, generator: Draw) -> tuple[Tensor, Tensor]:
    keep = keep_mask(x.shape, 1 - p, generator())
    return _apply(x, keep, p), keep.to(torch.uint8)


@drawing
def byte_dropout_or_not(x: Tensor, p: float, train: bool, *, generator: Draw) -> Tensor:
    return byte_dropout(x, p, generator=generator)[0] if train else x.clone()


def backward(grad: Tensor, mask: Tensor, p: float) -> Tensor:
    return _apply(grad, unpack(mask, grad.shape), p)


def byte_backward(grad: Tensor, mask: Tensor, p: float) -> Tensor:
    return _apply(grad, mask.bool().view_as(grad), p)


def do_mask(x: Tensor, mask: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return _apply(x, unpack(mask, x.shape), p), mask.clone()


@drawing
def gen_mask(size: Sequence[int], p: float, *_: Any, generator: Draw, **__: Any) -> Tensor:
    return pack(keep_mask(size, 1 - p, generator()))


def seeded_mask(x: Tensor, size: Sequence[int], p: float, seed: int, offset: int, **_: Any) -> Tensor:
    return pack(keep_mask(size, 1 - p, torch.Generator("cpu").manual_seed(seed * 31 + offset)))


@drawing
def with_add_softmax(
    x: Tensor, x1: Tensor, alpha: float, prob: float, dim: int, *, generator: Draw
) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, softmax(x1 + alpha · x), dropout of it)"""
    soft = torch.softmax(x1.float() + alpha * x.float(), dim).to(x.dtype)
    out, mask = dropout(soft, prob, generator=generator)
    return mask, soft, out


def with_add_softmax_backward(
    grad: Tensor, mask: Tensor, soft: Tensor, alpha: float, prob: float, dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by x1."""
    through = backward(grad, mask, prob).float()
    dsum = (through - (through * soft.float()).sum(dim, keepdim=True)) * soft.float()
    return (alpha * dsum).to(grad.dtype), dsum.to(grad.dtype)


def masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask.to(x.dtype) * scale


def exponential_(x: Tensor, lambd: float = 1.0, *, generator: torch.Generator) -> Tensor:
    return x.exponential_(lambd, generator=generator)


TABLE: dict[str, Callable[..., Any]] = {
    "_npu_dropout": dropout,
    "npu_dropout_backward": backward,
    "npu_dropout_do_mask": do_mask,
    "npu_dropout_gen_mask": gen_mask,
    "_npu_dropout_gen_mask.Tensor": seeded_mask,
    "_dropout_with_byte_mask": byte_dropout,
    "_dropout_with_byte_mask_backward": byte_backward,
    "dropout_with_byte_mask": byte_dropout_or_not,
    "npu_dropout_with_add_softmax": with_add_softmax,
    "npu_dropout_with_add_softmax_backward": with_add_softmax_backward,
    "_masked_scale": masked_scale,
    "npu_sim_exponential_": exponential_,
}
