"""Attention of many queries: blocks of query rows, each over the keys that its band can reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen2_npu.ops.attention.lengths import all_known, as_column, longest
from qwen2_npu.ops.attention.masks import Band
from qwen2_npu.ops.attention.sdpa import attend, log_sum_exp

BLOCK_ROWS = 256


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    drop: Tensor | None,
    band: Band,
    q_lens: Sequence[int] | None,
    kv_lens: Sequence[int] | None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the visible keys; rows that see none, and rows past their length, are 0.

    Args:
        q: (B, Nq, Sq, D); k, v: (B, Nkv, Skv, D), any strides.
        drop: bool (B|1, 1, Sq, Skv), True drops, or None.
        band: which keys around the diagonal are visible.
        q_lens, kv_lens: live rows per batch row (or one for all), or None for all.

    Returns:
        out (B, Nq, Sq, D), and lse fp32 (B, Nq, Sq, 1), +inf where a row sees no key, or None.
    """
    full_len, full_q = k.shape[2], q
    if kv_lens is not None:
        live = longest(kv_lens)
        k, v = k[:, :, :live], v[:, :, :live]
    if q_lens is not None:
        q = q[:, :, : longest(q_lens)]
    rows, cols = q.shape[2], k.shape[2]
    if rows == 0 or cols == 0:
        return torch.zeros_like(full_q), _no_lse(full_q) if want_lse else None

    kv_column = None
    if kv_lens is not None and len(kv_lens) > 1:
        # Slots between a row's length and the longest are never read: NaN there must not reach the product.
        kv_column = as_column(kv_lens, q.device)
        alive = torch.arange(cols, device=q.device).view(1, 1, -1, 1) < kv_column
        k, v = torch.where(alive, k, 0), torch.where(alive, v, 0)
    offset: int | Tensor = 0
    if band.from_end:
        offset = _offset(q_lens or [full_q.shape[2]], kv_lens or [full_len], q.device)
    band = _simplify(band, rows, cols, offset)

    if drop is None and kv_column is None and band.is_open:
        out = attend(q, k, v, scale=scale)
        lse = log_sum_exp(q, k, scale=scale) if want_lse else None
    elif drop is None and not want_lse and _is_causal(band, offset, q_lens, kv_lens):
        # The triangle ends with the last query.
        out, lse = attend(q, k[:, :, :rows], v[:, :, :rows], scale=scale, causal=True), None
    else:
        out, lse = _in_blocks(q, k, v, scale, drop, band, offset, kv_column, want_lse)
    return _restore_rows(out, lse, full_q, q_lens)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    drop: Tensor | None,
    band: Band,
    offset: int | Tensor,
    kv_column: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of blocks of query rows, each over the keys that its band reaches."""
    outs, lses = [], []
    for first, last, low, high in _blocks(q.shape[2], k.shape[2], band, offset):
        block, block_k = q[:, :, first:last], k[:, :, low:high]
        keep = _keep(first, last, low, high, band, offset, kv_column, q.device)
        if drop is not None:
            kept = ~drop[:, :, first:last, low:high]
            keep = kept if keep is None else keep & kept
        out = attend(block, block_k, v[:, :, low:high], scale=scale, keep=keep)
        if keep is not None:
            sighted = keep.any(-1, keepdim=True)
            out = torch.where(sighted, out, 0)
        outs.append(out)
        if want_lse:
            lse = log_sum_exp(block, block_k, scale=scale, keep=keep)
            lses.append(lse if keep is None else torch.where(sighted, lse, torch.inf))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return out, torch.cat(lses, 2) if want_lse else None


def _no_lse(q: Tensor) -> Tensor:
    return q.new_full((*q.shape[:3], 1), torch.inf, dtype=torch.float32)


def _offset(q_lens: Sequence[int], kv_lens: Sequence[int], device: torch.device) -> int | Tensor:
    if len(q_lens) == 1 and len(kv_lens) == 1:
        return kv_lens[0] - q_lens[0]
    if all_known(q_lens) and all_known(kv_lens):
        count = max(len(q_lens), len(kv_lens))
        queries, keys = list(q_lens) * (count // len(q_lens)), list(kv_lens) * (count // len(kv_lens))
        offsets = [n - m for m, n in zip(queries, keys, strict=True)]
        return offsets[0] if offsets.count(offsets[0]) == count else as_column(offsets, device)
    return as_column(kv_lens, device) - as_column(q_lens, device)


def _simplify(band: Band, rows: int, cols: int, offset: int | Tensor) -> Band:
    """Drop the bounds that no query of this size can reach."""
    if not isinstance(offset, int) or not isinstance(rows, int) or not isinstance(cols, int):
        return band
    before, after = band.before, band.after
    if before is not None and rows - 1 - before + offset <= 0:
        before = None
    if after is not None and after + offset >= cols - 1:
        after = None
    return band._replace(before=before, after=after)


def _is_causal(band: Band, offset: int | Tensor, q_lens: Sequence[int] | None, kv_lens: Sequence[int] | None) -> bool:
    """Whether the band is the top-left triangle and hides the keys past each row's length, too."""
    if band.before is not None or band.after != 0 or isinstance(offset, Tensor) or offset != 0:
        return False
    if kv_lens is None or len(kv_lens) == 1:
        return True
    if q_lens is None or not all_known(q_lens) or not all_known(kv_lens):
        return False
    queries = list(q_lens) * (len(kv_lens) // len(q_lens))
    return all(keys >= live for keys, live in zip(kv_lens, queries, strict=True))


def _blocks(rows: int, cols: int, band: Band, offset: int | Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(first query, last query + 1, first key, last key + 1) of each block; keys no query reaches are left out."""
    if band.is_open or not isinstance(rows, int) or not isinstance(cols, int) or not isinstance(offset, int):
        # A symbolic size has no known number of blocks, and a tensor of offsets no known reach.
        yield 0, rows, 0, cols
        return
    for first in range(0, rows, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, rows)
        low = 0 if band.before is None else min(max(first - band.before + offset, 0), cols - 1)
        high = cols if band.after is None else max(min(last + band.after + offset, cols), low + 1)
        yield first, last, low, high


def _keep(
    first: int,
    last: int,
    low: int,
    high: int,
    band: Band,
    offset: int | Tensor,
    kv_column: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """bool, broadcastable to (B, 1, last − first, high − low), or None where all is visible."""
    keep = None
    cols = torch.arange(low, high, device=device)
    if kv_column is not None:
        keep = cols < kv_column
    if not band.is_open:
        distance = cols - torch.arange(first, last, device=device).unsqueeze(-1) - offset
        if band.after is not None:
            visible = distance <= band.after
            keep = visible if keep is None else keep & visible
        if band.before is not None:
            visible = distance >= -band.before
            keep = visible if keep is None else keep & visible
    return keep


def _restore_rows(
    out: Tensor,
    lse: Tensor | None,
    full_q: Tensor,
    q_lens: Sequence[int] | None,
) -> tuple[Tensor, Tensor | None]:
    """Zero the rows past each length, and pad to all queries."""
    rows = out.shape[2]
    if q_lens is not None and len(q_lens) > 1:
        live = torch.arange(rows, device=out.device).view(1, 1, -1, 1) < as_column(q_lens, out.device)
        out = torch.where(live, out, 0)
        lse = None if lse is None else torch.where(live, lse, torch.inf)
    if q_lens is not None:
        missing = full_q.shape[2] - rows
        out = torch.nn.functional.pad(out, (0, 0, 0, missing))
        lse = None if lse is None else torch.nn.functional.pad(lse, (0, 0, 0, missing), value=torch.inf)
    return out, lse
