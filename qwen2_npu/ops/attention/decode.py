"""Attention of one query per row over a cache: reads the live window only, never the whole cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2_npu.ops.attention.layouts import Geometry, heads_first
from qwen2_npu.ops.attention.lengths import all_known, as_column, check_lengths, longest
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
        ragged: the part of the window that some row does not own, or None where the host does not know it.
        rows: bool (B|1, 1, 1, 1), rows that own any slot at all, or None where all do.
    """

    first: int | None
    length: int
    slots: Tensor | None = None
    keep: Tensor | None = None
    ragged: slice | None = None
    rows: Tensor | None = None

    def take(self, cache: Tensor, dim: int) -> Tensor:
        if self.slots is not None:
            return cache.index_select(dim, self.slots)
        assert self.first is not None
        return cache.narrow(dim, self.first, self.length)

    def own(self, taken: Tensor) -> Tensor:
        """`taken` (B, N, length, D) with zeros in the slots that a row does not own.

        The device never reads those: NaN there must not reach the product.
        """
        if self.keep is None:
            return taken
        owner = self.keep.transpose(-1, -2)
        if self.ragged is None:
            return torch.where(owner, taken, 0)
        owned = taken.clone()  # a plain copy, and a select over the ragged part only: several times faster
        owned[:, :, self.ragged].masked_fill_(~owner[:, :, self.ragged], 0)
        return owned


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
    lengths_name: str = "actual_seq_lengths",
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One query per row over its window of the cache.

    Args:
        query, key, value: in `size.layout`, Sq = 1.
        mask: drops cache slots, indexed from the start of the cache: (B, S), (B, 1, S) or (B, 1, 1, S). A row with
            every slot of its window dropped gets the mean of V over the window: masked scores are −1e12, not −inf.
        lengths: live slots per row, 1 or B entries; None is the whole cache. Errors call it `lengths_name`.
        kv_padding_size: p, read from its first element: row b's window is [Skv − p − len_b, Skv − p) instead of
            [0, len_b); a window that starts before the cache is empty.

    Returns:
        out (B, Nq, D), 0 for rows with an empty window; lse fp32 (B, Nq, 1, 1) or None.

    Raises:
        ValueError: lengths, mask or padding do not fit.
    """
    if lengths is not None:
        lengths = check_lengths(op, lengths_name, lengths, size.batch, size.kv_len)
    if lengths is None and kv_padding_size is not None:
        raise invalid(op, "kv_padding_size", kv_padding_size, f"only together with {lengths_name}")
    window = _window(op, size.kv_len, lengths, kv_padding_size, query.device)
    batch, heads = size.batch, size.q_heads
    # With the heads of a group as its queries, the cache is read once per group and never repeated.
    q = query.reshape(batch, size.kv_heads, heads // size.kv_heads, size.head_dim)
    if window.length == 0:
        empty = q.new_full((batch, heads, 1, 1), torch.inf, dtype=torch.float32) if want_lse else None
        return torch.zeros_like(q).view(batch, heads, size.head_dim), empty

    k = window.own(window.take(heads_first(key, size.layout, size.kv_heads), 2))
    v = window.own(window.take(heads_first(value, size.layout, size.kv_heads), 2))
    visible = window.keep
    if mask is None:
        out = attend(q, k, v, scale=scale, keep=visible)
    else:
        visible = _visible(op, mask, batch, window)
        out = _attend_or_mean(q, k, v, visible, window, scale)
    if window.rows is not None:
        out = torch.where(window.rows, out, 0)
    lse = _lse(q, k, window, visible, scale).view(batch, heads, 1, 1) if want_lse else None
    return out.reshape(batch, heads, size.head_dim), lse


def _visible(op: str, mask: Tensor, batch: int, window: Window) -> Tensor:
    """bool (B|1, 1, 1, length): slots of the window that the row owns and the mask does not drop."""
    min_len = window.length if window.first is None else window.first + window.length
    visible = ~window.take(decode_drop(op, mask, batch, min_len), 3)
    return visible if window.keep is None else visible & window.keep


def _attend_or_mean(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, window: Window, scale: float) -> Tensor:
    """Attention over the visible slots; in rows without any, the mean of V over the window."""
    blind = ~visible.any(-1, keepdim=True)
    keep = visible | (blind if window.keep is None else blind & window.keep)
    # Equal scores over the window give its mean: what −1e12 in every place comes to.
    return attend(torch.where(blind, 0, q), k, v, scale=scale, keep=keep)


def _window(
    op: str, cache_len: int, lengths: Sequence[int] | None, padding: Tensor | None, device: torch.device
) -> Window:
    """At the start of the cache, or where ``padding`` puts it."""
    if padding is None or lengths is None:
        return _left_window(cache_len, lengths, device)
    return _right_window(op, cache_len, lengths, padding, device)


def _left_window(cache_len: int, lengths: Sequence[int] | None, device: torch.device) -> Window:
    if lengths is None:
        return Window(0, cache_len)
    length = longest(lengths)
    if len(lengths) == 1:
        return Window(0, length)
    column = as_column(lengths, device)
    keep = torch.arange(length, device=device) < column
    if not all_known(lengths):
        return Window(0, length, keep=keep, rows=column > 0)
    shortest = min(lengths)
    return Window(0, length, keep=keep, ragged=slice(shortest, None), rows=None if shortest else column > 0)


def _right_window(op: str, cache_len: int, lengths: Sequence[int], padding: Tensor, device: torch.device) -> Window:
    if padding.dtype != torch.int64 or padding.numel() < 1:
        raise invalid(op, "kv_padding_size", padding, "an int64 tensor with one element, shared by the batch")
    padding = padding.reshape(-1)[0]
    if is_readable(padding) and all_known(lengths):
        end = cache_len - max(int(padding), 0)
        lengths = [n if n <= end else 0 for n in lengths]  # a window that starts before the cache is empty
        length = max(lengths)
        first = end - length if length else 0
        if len(lengths) == 1:
            return Window(first, length)
        column = as_column(lengths, device)
        keep = torch.arange(length, device=device) >= length - column
        return Window(first, length, keep=keep, ragged=slice(length - min(lengths)), rows=column > 0)
    # The padding is known to the device only: the window becomes a list of positions.
    length = longest(lengths)
    end_tensor = cache_len - padding.to(device).clamp(min=0)
    position = torch.arange(length, device=device)
    column = as_column(lengths, device)
    rows = (column > 0) & (column <= end_tensor)
    keep = (position >= length - column) & rows
    slots = (end_tensor - length + position).clamp(0, max(cache_len - 1, 0))
    return Window(None, length, slots, keep, rows=rows)


def _lse(q: Tensor, k: Tensor, window: Window, visible: Tensor | None, scale: float) -> Tensor:
    """Slots that the mask drops count exp(−1e12), which shows only where it drops them all; their number never does."""
    grouped = q.flatten(1, 2).unsqueeze(2)
    lse = log_sum_exp(grouped, k, scale=scale, keep=visible)
    if visible is not None and visible is not window.keep:
        lse = torch.where(visible.any(-1, keepdim=True), lse, MASK_FILL)
    return lse if window.rows is None else torch.where(window.rows, lse, torch.inf)
