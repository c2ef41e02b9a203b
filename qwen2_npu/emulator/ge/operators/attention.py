"""GE operators behind the npu:: operators of this project; the arithmetic is that of ``qwen2_npu.ops``."""

from __future__ import annotations

from typing import Any

import torch

from qwen2_npu import ops
from qwen2_npu.emulator.ge.operators.table import Tensor, operator


@operator("RmsNorm")
def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_rms_norm"](x, gamma, epsilon)


@operator("AddRmsNorm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return ops.kernels["npu_add_rms_norm"](x1, x2, gamma, epsilon)


LAYOUTS = {1: "BSND"}
"""``layout`` attribute of ApplyRotaryPosEmb -> the operator's name for it."""


@operator("ApplyRotaryPosEmb", writes=(0, 1))
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, layout: int = 1, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_apply_rotary_pos_emb"](query, key, cos, sin, LAYOUTS[layout], rotary_mode)


@operator("RotaryMul")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    return ops.kernels["npu_rotary_mul"](x, r1, r2)


@operator("SwiGlu")
def swiglu(x: Tensor, *, dim: int = -1) -> Tensor:
    return ops.kernels["npu_swiglu"](x, dim)


def _lengths(given: Tensor | None) -> list[int] | None:
    return None if given is None else given.tolist()


@operator("PromptFlashAttention")
def prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pse_shift: Tensor | None,
    atten_mask: Tensor | None,
    actual_seq_lengths: Tensor | None,
    actual_seq_lengths_kv: Tensor | None,
    deq_scale1: Tensor | None,
    quant_scale1: Tensor | None,
    deq_scale2: Tensor | None,
    quant_scale2: Tensor | None,
    quant_offset2: Tensor | None,
    *,
    num_heads: int,
    scale_value: float = 1.0,
    pre_tokens: int = 214748647,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    return ops.kernels["npu_prompt_flash_attention"](
        query, key, value, pse_shift=pse_shift, atten_mask=atten_mask,
        actual_seq_lengths=_lengths(actual_seq_lengths), actual_seq_lengths_kv=_lengths(actual_seq_lengths_kv),
        deq_scale1=deq_scale1, quant_scale1=quant_scale1, deq_scale2=deq_scale2, quant_scale2=quant_scale2,
        quant_offset2=quant_offset2, num_heads=num_heads, scale_value=scale_value, pre_tokens=pre_tokens,
        next_tokens=next_tokens, input_layout=input_layout, num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode, inner_precise=inner_precise,
    )  # fmt: skip


@operator("IncreFlashAttention")
def incre_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pse_shift: Tensor | None,
    atten_mask: Tensor | None,
    actual_seq_lengths: Tensor | None,
    dequant_scale1: Tensor | None,
    quant_scale1: Tensor | None,
    dequant_scale2: Tensor | None,
    quant_scale2: Tensor | None,
    quant_offset2: Tensor | None,
    antiquant_scale: Tensor | None,
    antiquant_offset: Tensor | None,
    block_table: Tensor | None,
    kv_padding_size: Tensor | None,
    *,
    num_heads: int,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    return ops.kernels["npu_incre_flash_attention"](
        query, key, value, pse_shift=pse_shift, atten_mask=atten_mask,
        actual_seq_lengths=_lengths(actual_seq_lengths), antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset, block_table=block_table, dequant_scale1=dequant_scale1,
        quant_scale1=quant_scale1, dequant_scale2=dequant_scale2, quant_scale2=quant_scale2,
        quant_offset2=quant_offset2, kv_padding_size=kv_padding_size, num_heads=num_heads, scale_value=scale_value,
        input_layout=input_layout, num_key_value_heads=num_key_value_heads, block_size=block_size,
        inner_precise=inner_precise,
    )  # fmt: skip
