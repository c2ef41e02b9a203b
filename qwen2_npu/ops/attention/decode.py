"""Attention of one query per row over a cache: reads the live window only, never the whole cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2_npu.ops.attention.layouts import Geometry, heads_first
from qwen2_npu.ops.attention.lengths import as_column, check_lengths, longest
from qwen2_npu.ops.attention.masks import decode_drop
from qwen2_npu.ops.attention.sdpa import attend, log_sum_exp
from qwen2_npu.ops.checks import invalid, is_readable

MASK_FILL = -1e12  # the device's score of a masked key


class Window(NamedTuple):
    """The cache slots to read, first … first + length, and which of them belong to each row.

    Attributes:
        first: first slot, or None where `slots` holds the positions because the host does not know them.
        length: number of slots.
        slots: int64 (length,), or None.
        keep: bool (B, 1, 1, length), or None where every row owns the whole window.
        rows: bool (B|1, 1, 1, 1), rows that own any slot at all, or None where all do.
    """

    first: int | None
    length: int
    slots: Tensor | None = None
    keep: Tensor | None = None
    rows: Tensor | None = None

    def take(self, cache: Tensor, dim: int) -> Tensor:
        if self.slots is not None:
            return cache.index_select(dim, self.slots)
        assert self.first is not None
        return cache.narrow(dim, self.first, self.length)


def decode_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: Geometry,
    *,
    scale: float,
    mask: Tensor | None,
    lengths: Sequence[int] | None,
    kv_padding_size: Tensor | None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One query per row over its window of the cache.

    Args:
        query, key, value: in `size.layout`, Sq = 1.
        mask: drops cache slots, indexed from the start of the cache: (B, S), (B, 1, S) or (B, 1, 1, S). A row with
            every slot of its window dropped gets the mean of V over the window: masked scores are −1e12, not −inf.
        lengths: live slots per row, 1 or B entries; None is the whole cache.
        kv_padding_size: p, read from its first element: row b's window is [Skv − p − len_b, Skv − p) instead of
            [0, len_b); a window that starts before the cache is empty.

    Returns:
        out (B, Nq, D), 0 for rows with an empty window; lse fp32 (B, Nq, 1, 1) or None.

    Raises:
        ValueError: lengths, mask or padding do not fit.
    """
    if lengths is not None:
        lengths = check_lengths(op, "actual_seq_lengths", lengths, size.batch, size.kv_len)
    if kv_padding_size is None:
        window = _left_window(size.kv_len, lengths, query.device)
    elif lengths is None:
        raise invalid(op, "kv_padding_size", kv_padding_size, "only together with actual_seq_lengths")
    else:
        window = _right_window(op, size.kv_len, lengths, kv_padding_size, query.device)
    batch, heads = size.batch, size.q_heads
    # With the heads of a group as its queries, the cache is read once per group and never repeated.
    q = query.reshape(batch, size.kv_heads, heads // size.kv_heads, size.head_dim)
    if window.length == 0:
        empty = q.new_full((batch, heads, 1, 1), torch.inf, dtype=torch.float32) if want_lse else None
        return torch.zeros_like(q).view(batch, heads, size.head_dim), empty

    k = window.take(heads_first(key, size.layout, size.kv_heads), 2)
    v = window.take(heads_first(value, size.layout, size.kv_heads), 2)
    keep, fill = window.keep, None
    if keep is not None:
        # Slots of other rows are never read by the device: NaN there must not reach the product.
        column = keep.transpose(-1, -2)
        k, v = torch.where(column, k, 0), torch.where(column, v, 0)
    scored_q = q
    if mask is not None:
        min_len = window.length if window.first is None else window.first + window.length
        kept = ~window.take(decode_drop(op, mask, batch, min_len), 3)
        fill = kept
        masked = kept if keep is None else keep & kept
        blind = ~masked.any(-1, keepdim=True)
        # Equal scores over the window give its mean: what −1e12 in every place comes to.
        scored_q = torch.where(blind, 0, q)
        keep = masked | blind if keep is None else masked | (blind & keep)
    out = attend(scored_q, k, v, scale=scale, keep=keep)
    if window.rows is not None:
        out = torch.where(window.rows, out, 0)
    out = out.reshape(batch, heads, size.head_dim)
    return out, _lse(q, k, window, fill, scale).view(batch, heads, 1, 1) if want_lse else None


def _left_window(cache_len: int, lengths: Sequence[int] | None, device: torch.device) -> Window:
    if lengths is None:
        return Window(0, cache_len)
    length = longest(lengths)
    if len(lengths) == 1:
        return Window(0, length)
    column = as_column(lengths, device)
    rows = None if all(type(n) is int and n > 0 for n in lengths) else column > 0
    return Window(0, length, keep=torch.arange(length, device=device) < column, rows=rows)


def _right_window(
    op: str, cache_len: int, lengths: Sequence[int], padding: Tensor, device: torch.device
) -> Window:
    if padding.dtype != torch.int64 or padding.numel() < 1:
        raise invalid(op, "kv_padding_size", padding, "an int64 tensor with one element, shared by the batch")
    padding = padding.reshape(-1)[0]
    if is_readable(padding) and all(type(n) is int for n in lengths):
        end = cache_len - max(int(padding), 0)
        fitting = [n for n in lengths if n <= end]
        length = max(fitting, default=0)
        if len(fitting) == len(lengths) == 1 or length == 0:
            return Window(end - length, length) if length else Window(0, 0)
        # A row that does not fit owns no slot.
        column = as_column([n if n <= end else 0 for n in lengths], device)
        keep = torch.arange(length, device=device) >= length - column
        return Window(end - length, length, keep=keep, rows=column > 0)
    # The padding is known to the device only: the window becomes a list of positions.
    length = longest(lengths)
    end_tensor = cache_len - padding.to(device).clamp(min=0)
    position = torch.arange(length, device=device)
    column = as_column(lengths, device)
    rows = (column > 0) & (column <= end_tensor)
    keep = (position >= length - column) & rows
    slots = (end_tensor - length + position).clamp(0, max(cache_len - 1, 0))
    return Window(None, length, slots, keep, rows)


def _lse(q: Tensor, k: Tensor, window: Window, kept: Tensor | None, scale: float) -> Tensor:
    grouped = q.flatten(1, 2).unsqueeze(2)
    scores = log_sum_exp(grouped, k, scale=scale, keep=window.keep)
    if kept is not None:
        scores = _masked_lse(grouped, k, window, kept, scale)
    return scores if window.rows is None else torch.where(window.rows, scores, torch.inf)


def _masked_lse(grouped: Tensor, k: Tensor, window: Window, kept: Tensor, scale: float) -> Tensor:
    """Slots dropped by the mask count exp(−1e12), slots outside the window nothing."""
    visible = kept if window.keep is None else window.keep & kept
    inside = torch.ones_like(kept) if window.keep is None else window.keep
    count = inside.sum(-1, keepdim=True).to(torch.float32)
    lse = log_sum_exp(grouped, k, scale=scale, keep=visible)
    return torch.where(visible.any(-1, keepdim=True), lse, MASK_FILL + count.log())
