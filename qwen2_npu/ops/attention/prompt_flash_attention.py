"""npu_prompt_flash_attention (PFA): attention of the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from qwen2_npu.ops.attention.layouts import Geometry, check_contiguous, check_geometry, from_heads_first, heads_first
from qwen2_npu.ops.attention.lengths import check_lengths
from qwen2_npu.ops.attention.masks import UNBOUNDED, prompt_visibility
from qwen2_npu.ops.attention.prefill import prefill_attention
from qwen2_npu.ops.checks import reject_unsupported

OP = "npu_prompt_flash_attention"
LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")
MAX_BATCH = 65536

_check_geometry = partial(check_geometry, OP, supported_layouts=LAYOUTS, max_batch=MAX_BATCH)
HIGH_PRECISION = 10


def npu_prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    sparse_mode: int = 0,
    **unsupported: Any,
) -> Tensor:
    """softmax(scale · Q Kᵀ, where visible) V. Scores and softmax are fp32 in every dtype.

    Args:
        query, key, value: contiguous, in `input_layout`: BSH, BSND, BNSD, or BNSD_BSND (BNSD in, BSND out). Query
            head h reads key/value head h // (num_heads / num_key_value_heads).
        atten_mask: bool, int8 or uint8, True/1 drops a key: (Sq, Skv), (B|1, Sq, Skv) or (B|1, 1, Sq, Skv) in sparse
            modes 0 and 1; the (2048, 2048) triu(1) in modes 2 to 4.
        actual_seq_lengths, actual_seq_lengths_kv: live queries and keys per batch row, 1 or B entries.
        pre_tokens, next_tokens: the band of sparse modes 0 (with a mask; from the top-left corner) and 4 (from the
            bottom-right one).
        sparse_mode: 0 mask and band, 1 mask only, 2 top-left causal, 3 bottom-right causal, 4 band. Without a mask
            mode 0 sees everything: the default call is not causal. Plus 10: the device's high-precision variant for
            fp16; precision is high here either way.

    Returns:
        Attention output in `input_layout`. Rows past their length, and rows that see no key at all, are 0 (the device
        leaves the latter undefined).

    Raises:
        ValueError: names the argument that is not supported or does not fit.
    """
    if unsupported:
        reject_unsupported(OP, unsupported)
    if HIGH_PRECISION <= sparse_mode <= HIGH_PRECISION + 4:
        sparse_mode -= HIGH_PRECISION
    size = _check_geometry(
        query, key, value, layout=input_layout, num_heads=num_heads, num_key_value_heads=num_key_value_heads
    )
    out, _ = attend_prompt(
        OP,
        query,
        key,
        value,
        size,
        mask=atten_mask,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        q_lens=actual_seq_lengths,
        kv_lens=actual_seq_lengths_kv,
        scale=scale_value,
    )
    return out


def attend_prompt(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: Geometry,
    *,
    mask: Tensor | None,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    q_lens: Sequence[int] | None,
    kv_lens: Sequence[int] | None,
    scale: float,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Check what ``check_geometry`` has not, and compute; also for npu_fused_infer_attention_score.

    Returns:
        Attention output in `size.layout`; and fp32 (B, N, Sq, 1), the log-sum-exp, or None.
    """
    check_contiguous(op, query=query, key=key, value=value)
    drop, band = prompt_visibility(
        op,
        mask,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        batch=size.batch,
        q_len=size.q_len,
        kv_len=size.kv_len,
    )
    if q_lens is not None:
        q_lens = check_lengths(op, "actual_seq_lengths", q_lens, size.batch, size.q_len)
    if kv_lens is not None:
        kv_lens = check_lengths(op, "actual_seq_lengths_kv", kv_lens, size.batch, size.kv_len)
    out, lse = prefill_attention(
        heads_first(query, size.layout, size.q_heads),
        heads_first(key, size.layout, size.kv_heads),
        heads_first(value, size.layout, size.kv_heads),
        scale=scale,
        drop=drop,
        band=band,
        q_lens=q_lens,
        kv_lens=kv_lens,
        want_lse=want_lse,
    )
    return from_heads_first(out, size.layout), lse
