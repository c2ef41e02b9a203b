"""Rotary position embedding: npu_apply_rotary_pos_emb and npu_rotary_mul. Both compute x·cos + rotate(x)·sin."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid, is_plain, reject_unsupported

APPLY_HEAD_DIMS = (64, 128)
MUL_MAX_HEAD_DIM = 896


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotate_interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


_ROTATIONS = {"half": _rotate_half, "interleave": _rotate_interleaved}


def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """x·cos + cat(−x₂, x₁)·sin for query and key, **in place in eager mode**, out of place while being traced.

    That is what the device does: eager returns its own inputs, a graph leaves them untouched. Never use the old
    query and key afterwards. Each product is rounded to the dtype, as the eager Hugging Face model does.

    Args:
        query: (B, S, Nq, D); key: (B, S, Nkv, D); D is 64 or 128.
        cos, sin: (B|1, S, 1, D). All four of one dtype.

    Returns:
        query and key, rotated.

    Raises:
        ValueError: layout, mode, shape or dtype not supported.
    """
    op = "npu_apply_rotary_pos_emb"
    if layout != "BSND":
        raise invalid(op, "layout", layout, "'BSND'")
    if rotary_mode != "half":
        raise invalid(op, "rotary_mode", rotary_mode, "'half' (npu_rotary_mul has 'interleave')")
    check_float(op, "query", query)
    check_same_dtype(op, query, key=key, cos=cos, sin=sin)
    if query.dim() != 4:
        raise invalid(op, "query", query, "4 dimensions, (B, S, N, D)")
    batch, length, _, head_dim = query.shape
    if head_dim not in APPLY_HEAD_DIMS:
        raise invalid(op, "query", query, f"head_dim in {APPLY_HEAD_DIMS}; use npu_rotary_mul for other head sizes")
    if key.dim() != 4 or (key.shape[0], key.shape[1], key.shape[3]) != (batch, length, head_dim):
        raise invalid(op, "key", key, f"(B, S, N, D) with the query's B, S and D; query is {tuple(query.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[1:] != (length, 1, head_dim) or table.shape[0] not in (1, batch):
            raise invalid(op, name, table, f"(B, S, 1, D) = ({batch}, {length}, 1, {head_dim})")
    if is_plain(query) and is_plain(key):
        return _rotate_in_place(query, cos, sin), _rotate_in_place(key, cos, sin)
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = _rotate_half(x).mul_(sin)
    return x.mul_(cos).add_(rotated)


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """input·r1 + rotate(input)·r2, out of place.

    Args:
        input: (..., D), 3 or 4 dimensions in any order before D; D even and below 896.
        r1, r2: cos and sin, broadcastable to `input`, same dtype.
        rotary_mode: 'half' rotates (x₁, x₂) into (−x₂, x₁) by halves, 'interleave' by neighbouring pairs.
        rotate: not supported.

    Returns:
        Like `input`.

    Raises:
        ValueError: mode, shape or dtype not supported, or `rotate` given.
    """
    op = "npu_rotary_mul"
    if rotate is not None:
        reject_unsupported(op, {"rotate": rotate})
    rotation = _ROTATIONS.get(rotary_mode)
    if rotation is None:
        raise invalid(op, "rotary_mode", rotary_mode, " or ".join(map(repr, _ROTATIONS)))
    check_float(op, "input", input)
    check_same_dtype(op, input, r1=r1, r2=r2)
    if input.dim() not in (3, 4) or input.shape[-1] % 2 or not 2 <= input.shape[-1] < MUL_MAX_HEAD_DIM:
        raise invalid(op, "input", input, f"3 or 4 dimensions, the last even and below {MUL_MAX_HEAD_DIM}")
    for name, table in (("r1", r1), ("r2", r2)):
        if table.dim() != input.dim() or any(
            have not in (1, want) for have, want in zip(table.shape, input.shape, strict=True)
        ):
            raise invalid(op, name, table, f"a shape that broadcasts to the input's, {tuple(input.shape)}")
    return (input * r1).add_(rotation(input).mul_(r2))
