"""npu_fused_infer_attention_score (FIA, v1): the successor of both, by the number of queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen2_npu.ops.attention.decode import decode_attention
from qwen2_npu.ops.attention.layouts import Geometry, check_geometry
from qwen2_npu.ops.attention.masks import UNBOUNDED
from qwen2_npu.ops.attention.prompt_flash_attention import attend_prompt
from qwen2_npu.ops.checks import invalid, reject_unsupported

OP = "npu_fused_infer_attention_score"
LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")
MAX_BATCH = 65535

_check_geometry = partial(check_geometry, OP, supported_layouts=LAYOUTS, max_batch=MAX_BATCH)
INNER_PRECISE = (0, 1)
DECODE_SPARSE_MODES = (0, 1, 3)


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    kv_padding_size: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """npu_incre_flash_attention where Sq is 1, npu_prompt_flash_attention otherwise; see there.

    Differences: `scale`; key/value lengths are always `actual_seq_lengths_kv`; `next_tokens` is unbounded by default;
    `kv_padding_size` is for Sq = 1 only. With Sq = 1 the query length and the band have no effect, as on the device,
    and in sparse_mode 3, where one query sees every key, neither has the mask.

    Returns:
        Attention output; and the scores' log-sum-exp, fp32 (B, N, Sq, 1), +inf for rows without keys, or an empty
        tensor without `softmax_lse_flag`.

    Raises:
        ValueError: names the argument that is not supported or does not fit.
    """
    if unsupported:
        reject_unsupported(OP, unsupported)
    if inner_precise not in INNER_PRECISE:
        raise invalid(OP, "inner_precise", inner_precise, "0 or 1")
    size = _check_geometry(
        query, key, value, layout=input_layout, num_heads=num_heads, num_key_value_heads=num_key_value_heads
    )
    mask = _mask(size, atten_mask, sparse_mode, kv_padding_size)
    if size.q_len == 1:
        out, lse = _step(query, key, value, size, scale, mask, actual_seq_lengths_kv, kv_padding_size, softmax_lse_flag)
    else:
        out, lse = attend_prompt(
            OP,
            query,
            key,
            value,
            size,
            mask=mask,
            sparse_mode=sparse_mode,
            pre_tokens=pre_tokens,
            next_tokens=next_tokens,
            q_lens=actual_seq_lengths,
            kv_lens=actual_seq_lengths_kv,
            scale=scale,
            want_lse=softmax_lse_flag,
        )
    return out, torch.empty(0, dtype=torch.float32, device=query.device) if lse is None else lse


def _mask(size: Geometry, mask: Tensor | None, sparse_mode: int, kv_padding_size: Tensor | None) -> Tensor | None:
    """The mask, where it has an effect.

    Raises:
        ValueError: ``sparse_mode`` or ``kv_padding_size`` is not for this number of queries.
    """
    if size.q_len != 1:
        if kv_padding_size is not None:
            raise invalid(OP, "kv_padding_size", kv_padding_size, "None for more than one query per row")
        return mask
    if sparse_mode not in DECODE_SPARSE_MODES:
        raise invalid(OP, "sparse_mode", sparse_mode, "0, 1 or 3 for a single query per row")
    return None if sparse_mode == 3 else mask


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: Geometry,
    scale: float,
    mask: Tensor | None,
    lengths: Sequence[int] | None,
    kv_padding_size: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """A decode step: one query per row. The output has the layout that was asked for."""
    out, lse = decode_attention(
        OP,
        query,
        key,
        value,
        size,
        scale=scale,
        mask=mask,
        lengths=lengths,
        kv_padding_size=kv_padding_size,
        lengths_name="actual_seq_lengths_kv",
        want_lse=want_lse,
    )
    return out.unsqueeze(1) if size.layout == "BNSD_BSND" else out.view(query.shape), lse
