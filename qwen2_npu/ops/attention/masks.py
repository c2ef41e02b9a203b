"""Attention masks and bands: which keys a query sees. In every mask True/1 means drop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2_npu.ops.checks import invalid

MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
UNBOUNDED = 2147483647  # the schemas' default of pre_tokens and next_tokens
COMPRESSED = 2048  # side of the mask that sparse modes 2 to 4 require
SPARSE_MODES = (0, 1, 2, 3, 4)


class Band(NamedTuple):
    """Query i sees key j where i − before ≤ j − offset ≤ i + after; None is unbounded.

    `from_end` counts from the bottom-right corner: offset = (live keys) − (live queries) of the row, else 0.
    """

    before: int | None = None
    after: int | None = None
    from_end: bool = False

    @property
    def is_open(self) -> bool:
        return self.before is None and self.after is None


def check_mask_dtype(op: str, mask: Tensor) -> Tensor:
    """The mask as bool."""
    if mask.dtype not in MASK_DTYPES:
        raise invalid(op, "atten_mask", mask, "dtype bool, int8 or uint8 (True or 1 drops a key)")
    return mask if mask.dtype == torch.bool else mask != 0


def prompt_visibility(
    op: str,
    mask: Tensor | None,
    *,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    batch: int,
    q_len: int,
    kv_len: int,
) -> tuple[Tensor | None, Band]:
    """The dropped keys as bool (B|1, 1, Sq, Skv) or None, and the band, of a prefill call.

    In modes 2 to 4 the 2048×2048 mask only has to be there: by the operator's contract it is triu(1), so the band
    alone says what it says and it is not read. Without a mask, mode 0 ignores pre_tokens and next_tokens, as the
    device does.

    Raises:
        ValueError: mode, mask shape or dtype not supported.
    """
    if sparse_mode not in SPARSE_MODES:
        raise invalid(op, "sparse_mode", sparse_mode, ", ".join(map(str, SPARSE_MODES)))
    if mask is None:
        if sparse_mode == 0:
            return None, Band()
        shape = (COMPRESSED, COMPRESSED) if sparse_mode > 1 else (q_len, kv_len)
        raise invalid(op, "atten_mask", None, f"a mask of shape {shape} in sparse_mode {sparse_mode}")
    drop = check_mask_dtype(op, mask)
    before = None if pre_tokens >= UNBOUNDED else pre_tokens
    after = None if next_tokens >= UNBOUNDED else next_tokens
    if sparse_mode > 1:
        if mask.shape[-2:] != (COMPRESSED, COMPRESSED) or any(n != 1 for n in mask.shape[:-2]):
            supported = f"({COMPRESSED}, {COMPRESSED}), triu(1), in sparse_mode {sparse_mode}"
            raise invalid(op, "atten_mask", mask, supported)
        if sparse_mode == 4:
            return None, Band(before, after, from_end=True)
        return None, Band(after=0, from_end=sparse_mode == 3)
    rows = mask.shape[0] if mask.dim() > 2 else 1
    if (
        mask.dim() not in (2, 3, 4)
        or mask.shape[-2:] != (q_len, kv_len)
        or (rows != 1 and rows != batch)
        or (mask.dim() == 4 and mask.shape[1] != 1)
    ):
        shapes = "(Sq, Skv), (B|1, Sq, Skv) or (B|1, 1, Sq, Skv)"
        raise invalid(op, "atten_mask", mask, f"{shapes} with B={batch}, Sq={q_len}, Skv={kv_len}")
    return drop.view(rows, 1, q_len, kv_len), Band() if sparse_mode == 1 else Band(before, after)


def decode_drop(op: str, mask: Tensor, batch: int, min_len: int) -> Tensor:
    """The dropped cache slots of a decode call as bool (B, 1, 1, S).

    Raises:
        ValueError: not (B, S), (B, 1, S) or (B, 1, 1, S), or S shorter than the longest row.
    """
    drop = check_mask_dtype(op, mask)
    ones: Sequence[int] = mask.shape[1:-1]
    if mask.dim() not in (2, 3, 4) or mask.shape[0] != batch or any(n != 1 for n in ones):
        raise invalid(op, "atten_mask", mask, f"(B, S), (B, 1, S) or (B, 1, 1, S) with B={batch}")
    if mask.shape[-1] < min_len:
        raise invalid(op, "atten_mask", mask, f"a last dimension of at least {min_len}, the live cache slots")
    return drop.view(batch, 1, 1, mask.shape[-1])
