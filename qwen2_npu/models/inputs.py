"""From what transformers passes (padded rows, 2-D masks) to what the layers take (compact rows, lengths, masks).

With the fixed cache every row is compacted to the left before the first layer: the tokens whose mask is 1, in order,
then the padding. Left padding, right padding and holes all become the same thing, a ragged batch aligned at slot 0.
Padding then comes after every live token, so causality alone keeps it out: no padding mask in prefill, none in decode.

Shapes: B batch, S new tokens, T tokens including the past, C slots of the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwen2_npu.cache import FixedKVCache
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models.arguments import check_mask_values
from qwen2_npu.models.attention import AttentionInputs, AttentionPhase
from qwen2_npu.models.layers import take_positions
from qwen2_npu.optimizations import Optimizations

COMPRESSED_MASK_SIZE = 2048
"""Side of the triangular mask the attention operators take for the causal and band sparse modes."""


@dataclass
class Rows:
    """The rows of one forward pass as the layers see them.

    Attributes:
        order: (B, S) compact position -> position given; None where rows are compact as given.
        lengths: live new tokens per row, on the host.
        padding: (B, S) as given, True where a token is padding; None where none is.
        hidden: (B, C) slots of the cache that hold a token which the mask of this call leaves out; None where none do.
    """

    order: torch.Tensor | None
    lengths: list[int]
    padding: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @classmethod
    def after(cls, cache: FixedKVCache, mask: torch.Tensor | None, batch: int, tokens: int) -> Rows:
        """The rows of a pass over ``tokens`` per row after what ``cache`` holds. Synchronises where there is a mask.

        Args:
            mask: (B, T); None where all tokens count.

        Raises:
            ValueError: see :meth:`of`.
            UnsupportedError: the mask takes for a token what was padding when it was written.
        """
        way_out = (
            f"pass attention_mask (batch, past + new tokens) = ({batch}, {cache.seen_tokens + tokens}) with 0 at all "
            "padding, or switch fixed_kv_cache off"
        )
        if mask is None:
            if cache.padding is None:
                return cls(None, [tokens] * batch)
            raise UnsupportedError(
                "some tokens were padding when they were written to the KV cache, which holds no padding, and without "
                f"an attention_mask they would count: {way_out}"
            )
        if bool((mask == (~cache.padding_of(cache.seen_tokens + tokens)).to(mask.dtype)).all()):
            return cls(None, [tokens] * batch)
        rows = cls.of(mask, batch, tokens, cache.lengths)
        old, padding = mask[:, :-tokens] != 0, cache.padding_of(cache.seen_tokens)
        shown, left_out = old & padding, ~(old | padding)
        any_shown, any_left_out = torch.stack((shown.any(), left_out.any())).tolist()
        if any_shown:
            row, column = shown.nonzero()[0].tolist()
            raise UnsupportedError(
                f"token {column} of row {row} was padding when it was written to the KV cache, which holds no "
                f"padding, and the attention_mask of this call takes it for a token: {way_out}"
            )
        if any_left_out:
            row_of, column_of = left_out.nonzero(as_tuple=True)
            slot_of = ((~padding).cumsum(dim=1) - 1)[row_of, column_of]
            rows.hidden = torch.zeros_like(cache.drop_mask)
            rows.hidden[row_of, slot_of] = True
        return rows

    @classmethod
    def of(cls, mask: torch.Tensor | None, batch: int, tokens: int, past: list[int] | None = None) -> Rows:
        """Read the last ``tokens`` columns of ``mask`` (B, T), 1 = live. Synchronises once where there is a mask.

        Args:
            past: live tokens per row before them; none by default.

        Raises:
            ValueError: a row without a live token, or a mask that holds more than 0 and 1.
        """
        if mask is None:
            return cls(None, [tokens] * batch)
        live = mask[:, -tokens:] != 0
        others = ((mask != 0) & (mask != 1)).sum()
        *lengths, wrong = torch.cat((live.sum(dim=1), others[None])).tolist()
        if wrong:
            check_mask_values(mask)
        for row, (length, before) in enumerate(zip(lengths, past or [0] * batch, strict=True)):
            if length + before == 0:
                raise ValueError(
                    f"row {row} of the attention_mask has no live token among the {tokens} new ones: "
                    "an empty prompt; give every row at least one token"
                )
        if min(lengths) == tokens:
            return cls(None, lengths)
        order = torch.argsort((~live).to(torch.float32), dim=1, stable=True)
        return cls(order, lengths, ~live)

    def compact(self, values: torch.Tensor) -> torch.Tensor:
        """(B, S, …) as given -> compact rows."""
        return values if self.order is None else take_positions(values, self.order)

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """Compact rows (B, S, …) -> as given; what stands at padding is unspecified."""
        return values if self.order is None else take_positions(values, torch.argsort(self.order, dim=1))

    def find(self, wanted: slice | torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
        """(B, K) compact positions of the K positions as given that ``wanted`` takes out of the ``tokens``."""
        if self.order is None:
            return torch.arange(tokens, device=device)[wanted].repeat(len(self.lengths), 1)
        return torch.argsort(self.order, dim=1)[:, wanted]


def check_window(live: torch.Tensor, window: int, slots: int) -> None:
    """Refuse rows with padding between their tokens where a sliding window may reach across it: the stock model counts
    that padding, and compact rows have none. Synchronises.

    Args:
        live: (B, T) bool, True at tokens.
        slots: tokens per row that may come to be.

    Raises:
        UnsupportedError: naming the row.
    """
    width = live.shape[1]
    order = torch.arange(1, width + 1, device=live.device)
    last, before = (live * order).amax(dim=1), width - (live * order.flip(0)).amax(dim=1)
    holes = (last - before != live.sum(dim=1)).tolist()
    if slots > window and any(holes):
        raise UnsupportedError(
            f"row {holes.index(True)} has padding between its tokens, which counts in the sliding window of {window}: "
            "pad on the left, or switch fixed_kv_cache off"
        )


def positions_after(past: int, tokens: int, batch: int, device: torch.device) -> torch.Tensor:
    """(B, S) as the stock model counts by itself: all tokens given, padding included."""
    return torch.arange(past, past + tokens, device=device).repeat(batch, 1)


def pad_tokens(values: torch.Tensor, length: int) -> torch.Tensor:
    """(B, S, …) -> (B, length, …), zeros behind."""
    padding = values.new_zeros(values.shape[0], length - values.shape[1], *values.shape[2:])
    return torch.cat((values, padding), dim=1)


class MaskFactory:
    """Masks (True = drop) for the phases, and the one that is built once: the compressed triangular mask."""

    def __init__(self, optimizations: Optimizations, window: int | None) -> None:
        self.optimizations = optimizations
        self.window = window
        self._compressed: torch.Tensor | None = None

    def _both(self, drop: torch.Tensor, distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``drop``, and ``drop`` with what lies ``window`` or more tokens back dropped as well."""
        return drop, None if self.window is None else drop | (distance >= self.window)

    def prefill(self, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masks of a prompt: compressed where the operator derives causality from it, else (S, S)."""
        if self.optimizations.flash_attention and self.optimizations.last_token_logits:
            if self._compressed is None or self._compressed.device != device:
                with torch.inference_mode(False):  # it outlives the call
                    square = torch.ones(COMPRESSED_MASK_SIZE, COMPRESSED_MASK_SIZE, dtype=torch.bool, device=device)
                    self._compressed = square.triu(1)
            return self._compressed, None if self.window is None else self._compressed
        positions = torch.arange(tokens, device=device)
        distance = positions[:, None] - positions
        return self._both(distance < 0, distance)

    def extend(
        self, cache: FixedKVCache, past: list[int], tokens: int, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 1, S, C): new token ``i`` of row ``b`` sees the slots up to ``past[b] + i``, but for ``hidden`` ones."""
        device = cache.shape.device
        starts = torch.tensor(past, device=device)
        queries = starts[:, None] + torch.arange(tokens, device=device)
        distance = (queries[:, :, None] - torch.arange(cache.shape.capacity, device=device))[:, None]
        drop = distance < 0
        return self._both(drop if hidden is None else drop | hidden[:, None, None], distance)

    def decode(self, cache: FixedKVCache) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The masks that the cache keeps, in the shape the attention of this model takes."""
        flash = self.optimizations.flash_attention
        full = None if self.optimizations.ifa_tiling else cache.drop_mask
        masks = (full, cache.sliding_drop_mask)
        if flash and not self.optimizations.fused_infer_attention:
            return masks
        return tuple(None if mask is None else mask[:, None, None] for mask in masks)  # type: ignore[return-value]

    def growing(
        self, mask: torch.Tensor | None, tokens: int, past: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(B or 1, 1, S, T) for the stock growing cache: padded rows, masked as the stock model masks them."""
        if mask is None and tokens == 1 and self.window is None:
            return None, None
        keys = torch.arange(past + tokens, device=device)
        distance = (past + torch.arange(tokens, device=device))[:, None] - keys
        drop = (distance < 0)[None, None]
        if mask is not None:
            drop = drop | (mask[:, None, None, :] == 0)
        return self._both(drop, distance)


@contextlib.contextmanager
def fixed_cache_step(
    cache: FixedKVCache | None,
    rows: Rows,
    tokens: int,
    length: int,
    position_ids: torch.Tensor | None,
    masks: MaskFactory,
    device: torch.device,
) -> Iterator[tuple[AttentionPhase, AttentionInputs]]:
    """Phase and inputs of a pass over compact rows, which the body computes; see :meth:`FixedKVCache.step`.

    Args:
        cache: None for a pass that keeps nothing.
        tokens: new tokens per row, padding included.
        length: positions per row that are computed, ``tokens`` or more.
        position_ids: (B, length) of the compact rows, or None to count from the tokens seen on.
    """
    if position_ids is None:
        position_ids = positions_after(0 if cache is None else cache.seen_tokens, length, len(rows.lengths), device)
    if cache is None:
        mask, sliding = masks.prefill(length, device)
        yield "prefill", AttentionInputs(position_ids, None, mask, sliding)
        return
    tiling = masks.optimizations.ifa_tiling
    with cache.step(rows.lengths, tokens, masks=not tiling, padding=rows.padding) as past:
        write_index = cache.write_index
        if max(past) == 0:
            mask, sliding = masks.prefill(length, device)
            yield "prefill", AttentionInputs(position_ids, write_index, mask, sliding)
        elif length > 1 or rows.hidden is not None:  # the masks that a decode step reads know of no hidden tokens
            mask, sliding = masks.extend(cache, past, length, rows.hidden)
            lengths = [start + length for start in past]
            yield "extend", AttentionInputs(position_ids, write_index, mask, sliding, lengths)
        else:
            live, sliding = masks.decode(cache)
            slots = cache.slots if masks.optimizations.kv_scatter else None
            yield (
                "decode",
                AttentionInputs(position_ids, write_index, live, sliding, cache.lengths if tiling else None, slots),
            )
