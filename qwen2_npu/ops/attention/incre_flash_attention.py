"""npu_incre_flash_attention (IFA): attention of a decode step, one query per row over the cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from qwen2_npu.ops.attention.decode import decode_attention
from qwen2_npu.ops.attention.layouts import Geometry, check_geometry
from qwen2_npu.ops.checks import invalid, reject_unsupported

OP = "npu_incre_flash_attention"
LAYOUTS = ("BSH", "BSND", "BNSD")
MAX_BATCH = 65535
MAX_CACHE = 262144

_check_geometry = partial(check_geometry, OP, supported_layouts=LAYOUTS, max_batch=MAX_BATCH)
INNER_PRECISE = (0, 1)


def npu_incre_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    kv_padding_size: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    inner_precise: int = 1,
    **unsupported: Any,
) -> Tensor:
    """softmax(scale · q Kᵀ, masked) V over each row's window of the cache. Costs what the live window costs.

    Args:
        query: (B, 1, H), (B, 1, N, D) or (B, N, 1, D) by `input_layout`; key, value: the cache, same layout.
        atten_mask: bool, int8 or uint8, True/1 drops a cache slot: (B, S), (B, 1, S) or (B, 1, 1, S), indexed from
            the start of the cache.
        actual_seq_lengths: live **key/value** slots per row, 1 or B entries.
        kv_padding_size: int64 with one element p: the windows end p slots before the end of the cache.
        inner_precise: 0 or 1; the device's choice of precision, fp32 here either way.

    Returns:
        Like `query`. Rows without live slots are 0; a row with every slot masked is the mean of V over its window.

    Raises:
        ValueError: names the argument that is not supported or does not fit.
    """
    if unsupported:
        reject_unsupported(OP, unsupported)
    if inner_precise not in INNER_PRECISE:
        raise invalid(OP, "inner_precise", inner_precise, "0 or 1")
    size = _geometry(query, key, value, input_layout, num_heads, num_key_value_heads)
    out, _ = decode_attention(
        OP,
        query,
        key,
        value,
        size,
        scale=scale_value,
        mask=atten_mask,
        lengths=actual_seq_lengths,
        kv_padding_size=kv_padding_size,
    )
    return out.view(query.shape)


def _geometry(query: Tensor, key: Tensor, value: Tensor, layout: str, heads: int, kv_heads: int) -> Geometry:
    """Of one query per row and a cache that the device can hold."""
    size = _check_geometry(query, key, value, layout=layout, num_heads=heads, num_key_value_heads=kv_heads)
    if size.q_len != 1:
        raise invalid(OP, "query", query, f"one query per row (S = 1 in {layout}); npu_prompt_flash_attention")
    if isinstance(size.kv_len, int) and size.kv_len > MAX_CACHE:
        raise invalid(OP, "key", key, f"at most {MAX_CACHE} cache slots")
    return size
