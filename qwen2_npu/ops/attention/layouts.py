"""Attention input layouts: how each is read heads first (BNSD), and the limits that the operators share.

Shape letters: B batch, S sequence, N heads, D head size, H = N·D, G = Nq / Nkv query heads per key/value head.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid, is_plain

# Layout -> (rank, axis of S).
LAYOUTS = {"BSH": (3, 1), "BSND": (4, 1), "BNSD": (4, 2), "BNSD_BSND": (4, 2)}

MAX_HEADS = 256
MAX_HEAD_DIM = 512
MAX_GROUP = 64
MAX_HIDDEN = 65535  # N·D stays below it where the heads are innermost: BSH, BSND
MAX_BATCH_UNALIGNED = 128
BLOCK_BYTES = 32  # a head is aligned when its bytes fill whole blocks


class Geometry(NamedTuple):
    """The sizes of one attention call. `batch` and the lengths may be symbolic while tracing."""

    layout: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int


def check_geometry(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: str,
    supported_layouts: tuple[str, ...],
    num_heads: int,
    num_key_value_heads: int,
    max_batch: int,
) -> Geometry:
    """Check query, key and value against each other, `layout` and the limits of the A2 devices.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if layout not in supported_layouts:
        raise invalid(op, "input_layout", layout, ", ".join(supported_layouts))
    if not 1 <= num_heads <= MAX_HEADS:
        raise invalid(op, "num_heads", num_heads, f"1 to {MAX_HEADS}")
    kv_heads = num_key_value_heads or num_heads
    if num_key_value_heads < 0 or num_heads % kv_heads or num_heads // kv_heads > MAX_GROUP:
        supported = f"0 (as num_heads) or a divisor of num_heads={num_heads}, at most {MAX_GROUP} times smaller"
        raise invalid(op, "num_key_value_heads", num_key_value_heads, supported)
    check_float(op, "query", query)
    check_same_dtype(op, query, key=key, value=value)

    rank, seq_axis = LAYOUTS[layout]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != rank:
            raise invalid(op, name, tensor, f"{rank} dimensions in layout {layout}")
    if layout == "BSH":
        if query.shape[2] % num_heads:
            raise invalid(op, "query", query, f"a last dimension that num_heads={num_heads} divides")
        head_dim = query.shape[2] // num_heads
        kv_tail: tuple[int, ...] = (kv_heads * head_dim,)
    else:
        head_axis = 3 - seq_axis
        head_dim = query.shape[3]
        if query.shape[head_axis] != num_heads:
            raise invalid(op, "query", query, f"num_heads={num_heads} heads at axis {head_axis} ({layout})")
        kv_tail = (kv_heads, head_dim)
    batch, kv_len = query.shape[0], key.shape[seq_axis]
    kv_shape = (batch, kv_len, *kv_tail) if seq_axis == 1 else (batch, kv_heads, kv_len, head_dim)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != kv_shape:
            raise invalid(op, name, tensor, f"shape {tuple(kv_shape)} ({layout}, num_key_value_heads={kv_heads})")

    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise invalid(op, "query", query, f"a head size of 1 to {MAX_HEAD_DIM}")
    if seq_axis == 1 and num_heads * head_dim >= MAX_HIDDEN:
        raise invalid(op, "query", query, f"num_heads · head size below {MAX_HIDDEN} in layout {layout}")
    if isinstance(batch, int):  # a symbolic batch would only gain a guard
        aligned = head_dim * query.dtype.itemsize % BLOCK_BYTES == 0
        limit = max_batch if aligned else MAX_BATCH_UNALIGNED
        if batch > limit:
            raise invalid(op, "query", query, f"a batch of at most {limit}")
    return Geometry(layout, batch, num_heads, kv_heads, query.shape[seq_axis], kv_len, head_dim)


def check_contiguous(op: str, **tensors: Tensor) -> None:
    """The prefill operators read packed memory; while tracing there is none to look at."""
    for name, tensor in tensors.items():
        if is_plain(tensor) and not tensor.is_contiguous():
            raise invalid(op, name, tensor, f"contiguous memory, not strides {tensor.stride()}; call .contiguous()")


def heads_first(tensor: Tensor, layout: str, heads: int) -> Tensor:
    """A (B, N, S, D) view of a tensor in any layout."""
    if layout == "BSH":
        return tensor.unflatten(2, (heads, tensor.shape[2] // heads)).transpose(1, 2)
    return tensor.transpose(1, 2) if layout == "BSND" else tensor


def from_heads_first(out: Tensor, layout: str) -> Tensor:
    """The attention output (B, N, S, D) in the layout that the operator returns, contiguous."""
    if layout == "BNSD":
        return out.contiguous()
    out = out.transpose(1, 2)
    return out.flatten(2) if layout == "BSH" else out.contiguous()
