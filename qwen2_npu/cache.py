"""The fixed KV cache: one k and one v tensor per layer, allocated once, updated in place.

Rows are ragged and left-aligned: row ``b`` holds its ``lengths[b]`` live tokens at slots ``[0, lengths[b])``, whatever
padding the prompt came with. So no slot of padding is ever read, no row is ever fully masked, and the window the
incremental attention operator reads is exactly ``actual_seq_lengths = lengths``.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from qwen2_npu.compat import head_dim, kv_head_count
from qwen2_npu.errors import CacheOverflowError

logger = logging.getLogger(__name__)

CAPACITY_BUCKET = 128
"""Capacities are multiples of this, so that close lengths share one cache and one compiled graph."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def round_capacity(tokens: int) -> int:
    """The capacity of the bucket that holds ``tokens``."""
    return max(1, math.ceil(tokens / CAPACITY_BUCKET)) * CAPACITY_BUCKET


def round_prompt(tokens: int, capacity: int) -> int:
    """The length a compiled prefill is given for a prompt of ``tokens``, at most ``capacity``.

    Four buckets per octave: at most a quarter more is computed, and a day of prompts needs some thirty graphs.
    """
    step = 1 << max(3, tokens.bit_length() - 3)
    return min(math.ceil(tokens / step) * step, capacity)


def human_bytes(count: float) -> str:
    """``1536`` -> ``'1.5 KiB'``."""
    power = min(int(math.log(max(count, 1), 1024)), len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"


@dataclass(frozen=True)
class CacheShape:
    """What a cache is allocated from; equal shapes can share one cache.

    Attributes:
        layout: "BNSD" (batch, kv heads, slots, head_dim) or "BSND" (batch, slots, kv heads, head_dim).
        sliding_window: tokens seen by the sliding layers, None when there are none.
    """

    layers: int
    batch_size: int
    capacity: int
    kv_heads: int
    head_dim: int
    layout: str
    dtype: torch.dtype
    device: torch.device
    sliding_window: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all k and v tensors."""
        elements = self.layers * 2 * self.batch_size * self.capacity * self.kv_heads * self.head_dim
        return elements * self.dtype.itemsize

    @property
    def tensor_shape(self) -> tuple[int, int, int, int]:
        """Shape of one k or v tensor."""
        if self.layout == "BNSD":
            return self.batch_size, self.kv_heads, self.capacity, self.head_dim
        return self.batch_size, self.capacity, self.kv_heads, self.head_dim

    @property
    def slot_axis(self) -> int:
        """The axis of the slots in one k or v tensor."""
        return 2 if self.layout == "BNSD" else 1

    def describe(self) -> str:
        """One line for logs and errors."""
        window = "" if self.sliding_window is None else f" with a window of {self.sliding_window}"
        return (
            f"KV cache {self.layout}{window}: {self.layers} layers × 2 × {self.batch_size} rows × "
            f"{self.capacity} slots × {self.kv_heads} heads × {self.head_dim} × "
            f"{str(self.dtype).removeprefix('torch.')} = {human_bytes(self.nbytes)}"
        )

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        kv_heads: int | None = None,
        batch_size: int,
        capacity: int,
        layout: str,
        dtype: torch.dtype,
        device: torch.device | str,
        sliding_window: int | None = None,
    ) -> CacheShape:
        """The shape for ``config``; ``capacity`` is rounded up to its bucket.

        Args:
            kv_heads: those of one rank; all of ``config`` by default.
        """
        return cls(
            layers=config.num_hidden_layers,
            batch_size=batch_size,
            capacity=round_capacity(capacity),
            kv_heads=kv_head_count(config) if kv_heads is None else kv_heads,
            head_dim=head_dim(config),
            layout=layout,
            dtype=dtype,
            device=torch.device(device),
            sliding_window=sliding_window,
        )


class FixedKVCache(Cache):
    """See the module's text. A transformers ``Cache``, so that ``generate`` takes and returns it.

    Attributes:
        shape: what it was allocated from.
        key_cache, value_cache: per layer one tensor of ``shape.tensor_shape``.
        lengths: live tokens per row, on the host: reading them costs no synchronisation.
        seen_tokens: tokens per row including padding: the sequence length as transformers counts it.
        padding: (batch, W) bool on the device, True where one of the first W tokens seen was padding, which no slot
            holds; None while there was none. Tokens after the first W are all held.
        write_index: (batch,) int64 on the device: the slot of each row's next token, equal to ``lengths``.
        drop_mask: (batch, capacity) bool, True where a slot is not live. Updated one slot per step, never rebuilt.
        sliding_drop_mask: the same within the sliding window, or None.
    """

    # Cache's own __init__ differs between versions and would create layers; this class stores tensors, not layers.
    def __init__(self, shape: CacheShape) -> None:
        logger.info("allocating %s on %s", shape.describe(), shape.device)
        self.shape = shape
        # It outlives the call that allocates it, and may be written outside of inference mode then.
        with torch.inference_mode(False):
            self._allocate(shape)
        self.lengths: list[int] = [0] * shape.batch_size
        self.seen_tokens = 0
        self.padding: torch.Tensor | None = None

    def _allocate(self, shape: CacheShape) -> None:
        try:
            tensors = [
                torch.zeros(shape.tensor_shape, dtype=shape.dtype, device=shape.device) for _ in range(2 * shape.layers)
            ]
        except RuntimeError as error:
            raise MemoryError(
                f"no room for the {shape.describe()} on {shape.device}: lower the batch size, the prompt length or "
                f"max_new_tokens ({str(error).splitlines()[0]})"
            ) from error
        self.key_cache, self.value_cache = tensors[: shape.layers], tensors[shape.layers :]
        self.write_index = torch.zeros(shape.batch_size, dtype=torch.int64, device=shape.device)
        self._first_slots = torch.arange(shape.batch_size, device=shape.device) * shape.capacity
        self.drop_mask = torch.ones(shape.batch_size, shape.capacity, dtype=torch.bool, device=shape.device)
        self.sliding_drop_mask = self.drop_mask.clone() if shape.sliding_window is not None else None

    @property
    def slots(self) -> torch.Tensor:
        """(batch,) int64 on the device: ``write_index`` counted over all rows, each a block of ``capacity`` slots."""
        return self._first_slots + self.write_index

    # ---- what the model does with it -----------------------------------------------------------------------------
    def check_room(self, batch_size: int, new_tokens: int) -> None:
        """Refuse a step that does not fit, before anything is written.

        Raises:
            CacheOverflowError: more tokens than free slots, or another batch size.
        """
        if batch_size != self.shape.batch_size:
            raise CacheOverflowError(
                f"the batch has {batch_size} rows but the KV cache was allocated for {self.shape.batch_size}; "
                f"allocate_cache(batch_size={batch_size}, capacity=…)"
            )
        used = max(self.lengths)
        if used + new_tokens > self.shape.capacity:
            raise CacheOverflowError(
                f"{new_tokens} new tokens after {used} do not fit the KV cache of {self.shape.capacity} slots; "
                f"call grow({used + new_tokens} or more) of this cache, or allocate_cache(batch_size={batch_size}, "
                f"capacity={used + new_tokens} or more) before the prompt; generate() does so by itself"
            )

    def grow(self, capacity: int) -> None:
        """Room for ``capacity`` tokens per row, rounded up to its bucket; nothing where there is as much already. The
        live tokens are copied once, and the tensors are other ones afterwards.

        Raises:
            MemoryError: the larger tensors do not fit the device beside the present ones; nothing has changed then.
        """
        if capacity <= self.shape.capacity:
            return
        larger = FixedKVCache(replace(self.shape, capacity=round_capacity(capacity)))
        live = max(self.lengths)
        for old, new in zip(self.key_cache + self.value_cache, larger.key_cache + larger.value_cache, strict=True):
            new.narrow(self.shape.slot_axis, 0, live).copy_(old.narrow(self.shape.slot_axis, 0, live))
        self.shape, self.key_cache, self.value_cache = larger.shape, larger.key_cache, larger.value_cache
        self.drop_mask, self.sliding_drop_mask = larger.drop_mask, larger.sliding_drop_mask
        self._first_slots = larger._first_slots
        self._rebuild_masks()

    @contextlib.contextmanager
    def step(
        self, new_lengths: list[int], tokens: int, *, masks: bool = True, padding: torch.Tensor | None = None
    ) -> Iterator[list[int]]:
        """One forward pass: its body writes the new k and v at ``write_index``. ``lengths`` and the masks count the new
        tokens already.

        A body that raises leaves the cache as it was: the step can be tried again.

        Args:
            new_lengths: live new tokens per row.
            tokens: new tokens per row, padding included.
            masks: whether a decode step of this model reads ``drop_mask``.
            padding: (batch, tokens) bool, True where a new token is padding; None where none is.

        Yields:
            Live tokens per row before the step.
        """
        past, seen_tokens, past_padding = self.lengths, self.seen_tokens, self.padding
        try:
            full = min(new_lengths) == tokens
            if full and tokens == 1:
                self._count_one(masks)
            else:
                self._count(new_lengths)
            yield past
            if full:
                self.write_index.add_(tokens)
            else:
                self.write_index.add_(torch.tensor(new_lengths, dtype=torch.int64, device=self.shape.device))
            if padding is not None:
                self.padding = torch.cat((self.padding_of(seen_tokens), padding), dim=1)
            self.seen_tokens = seen_tokens + tokens
        except BaseException:  # an interrupt, too
            self.padding = past_padding
            self._go_back(past, seen_tokens)
            raise

    def padding_of(self, tokens: int) -> torch.Tensor:
        """(batch, tokens) bool: which of the first ``tokens`` seen were padding."""
        known = self.drop_mask[:, :0] if self.padding is None else self.padding[:, :tokens]
        return torch.cat((known, known.new_zeros(known.shape[0], tokens - known.shape[1])), dim=1)

    def _count(self, new_lengths: list[int]) -> None:
        """Several new tokens per row: the masks are built anew."""
        self.lengths = [old + new for old, new in zip(self.lengths, new_lengths, strict=True)]
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=self.shape.device)
        slots = torch.arange(self.shape.capacity, device=self.shape.device)
        torch.ge(slots, lengths[:, None], out=self.drop_mask)
        if self.sliding_drop_mask is not None:
            assert self.shape.sliding_window is not None
            expired = slots < lengths[:, None] - self.shape.sliding_window
            torch.logical_or(self.drop_mask, expired, out=self.sliding_drop_mask)

    def _count_one(self, masks: bool) -> None:
        """One new token per row, at ``write_index``: no synchronisation, one slot of the masks touched."""
        self.lengths = [length + 1 for length in self.lengths]
        slot = self.write_index[:, None]
        if masks:
            self.drop_mask.scatter_(1, slot, False)
        if self.sliding_drop_mask is not None:
            window = self.shape.sliding_window
            assert window is not None
            self.sliding_drop_mask.scatter_(1, slot, False)
            # The slot that leaves the window; while none does, slot 0 is written with what it holds.
            self.sliding_drop_mask.scatter_(1, (slot - window).clamp(min=0), slot >= window)

    def _go_back(self, lengths: list[int], seen_tokens: int) -> None:
        """Undo a step that failed, wherever it did."""
        self.lengths, self.seen_tokens = lengths, seen_tokens
        self.write_index.copy_(torch.tensor(lengths, dtype=torch.int64))
        self._rebuild_masks()
        # What the step wrote is dead again. A NaN in it would still reach sums in which its weight is 0.
        dead = self.drop_mask[:, :, None, None] if self.shape.slot_axis == 1 else self.drop_mask[:, None, :, None]
        for tensor in self.key_cache + self.value_cache:
            tensor.masked_fill_(dead, 0)

    # ---- transformers' Cache interface ---------------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens per row seen so far, padding included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots per row."""
        return self.shape.capacity

    get_max_cache_shape = get_max_length

    def get_usable_length(self, new_seq_length: int, layer_idx: int | None = 0) -> int:
        """All of what it holds is usable: overflow raises instead of dropping."""
        return self.seen_tokens

    @property
    def is_compileable(self) -> bool:
        """False: transformers must not build 4-D masks for it; see qwen2_npu.graph for compilation."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer: all tokens are kept, masks cut the window."""
        return [False] * self.shape.layers

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: no linear attention."""
        return [False] * self.shape.layers

    @property
    def is_initialized(self) -> bool:
        """True: allocated on construction."""
        return True

    @property
    def is_croppable(self) -> bool:
        """True: see :meth:`crop`."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.shape.batch_size

    def activate_past_recording(self) -> None:
        """Nothing to do: the past is never dropped."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: :meth:`crop` can always go back."""
        return True

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """No layers, and no tuples: rows are not where transformers would look for them.

        Raises:
            AttributeError: with where they are.
        """
        raise AttributeError(self._elsewhere("layers"))

    def __getitem__(self, layer: int) -> Any:
        raise TypeError(self._elsewhere(f"[{layer}]"))

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model writes the cache itself, in one step for all layers."""
        raise TypeError(self._elsewhere("update()"))

    def _elsewhere(self, name: str) -> str:
        return (
            f"FixedKVCache has no {name}: keys and values of a layer are key_cache[layer] and value_cache[layer], "
            f"{self.shape.layout} of {self.shape.tensor_shape}, where row b holds its tokens at slots 0 to "
            "lengths[b] - 1; switch fixed_kv_cache off for the stock cache"
        )

    def __len__(self) -> int:
        return self.shape.layers

    def __repr__(self) -> str:
        return f"FixedKVCache({self.shape.describe()}; lengths={self.lengths})"

    def reset(self) -> None:
        """Forget everything; the tensors keep their addresses. Zeroed, so that a NaN of an earlier run cannot leak."""
        for tensor in self.key_cache + self.value_cache:
            tensor.zero_()
        self.write_index.zero_()
        self.lengths = [0] * self.shape.batch_size
        self.seen_tokens = 0
        self.padding = None
        self._rebuild_masks()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``, in place, live slots only. For beam search.

        Where it fails, rows that others have overwritten are gone: the cache is empty then.
        """
        try:
            self._reorder(beam_idx.to(self.shape.device))
        except BaseException:
            self.reset()
            raise

    def _reorder(self, beam_idx: torch.Tensor) -> None:
        live = max(self.lengths)
        for tensor in self.key_cache + self.value_cache:
            slots = tensor.narrow(self.shape.slot_axis, 0, live)
            slots.copy_(slots.index_select(0, beam_idx))
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx)
        if len(set(self.lengths)) > 1:  # beams of one prompt are equally long: only other orders need the host
            self.lengths = [self.lengths[row] for row in beam_idx.tolist()]
            self.write_index.copy_(self.write_index.index_select(0, beam_idx))
            self._rebuild_masks()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused: the number of rows is fixed."""
        raise CacheOverflowError(
            "the fixed KV cache cannot change its number of rows; switch fixed_kv_cache off for this kind of search"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the number of rows is fixed."""
        self.batch_select_indices(torch.empty(0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row (assisted decoding).

        Args:
            tokens_to_remove: their number as a negative number. Early releases of transformers 5 pass a positive one:
                the tokens per row that are kept, padding included.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.seen_tokens, 0)
        kept = self.seen_tokens + tokens_to_remove
        removed = [-tokens_to_remove] * self.shape.batch_size
        if self.padding is not None and kept < self.padding.shape[1]:
            removed = [-tokens_to_remove - padding for padding in self.padding[:, kept:].sum(dim=1).tolist()]
        lengths = [length - live for length, live in zip(self.lengths, removed, strict=True)]
        if min(lengths) < 0:
            raise CacheOverflowError(
                f"crop({tokens_to_remove}) of rows of {self.lengths} tokens: a row has fewer tokens to remove"
            )
        if tokens_to_remove == 0:
            return
        self.lengths, self.seen_tokens = lengths, kept
        self.padding = None if self.padding is None else self.padding[:, :kept]
        self.write_index.copy_(torch.tensor(lengths, dtype=torch.int64))
        self._rebuild_masks()

    def _rebuild_masks(self) -> None:
        self._count([0] * self.shape.batch_size)
