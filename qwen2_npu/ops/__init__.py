"""The npu:: operators that Qwen2 needs, on CPU and CUDA: importing this makes torch.ops.npu.* usable.

An operator is found by its name: its schema in `schemas`, its kernel in `norms`, `rotary`, `scatter`, `swiglu`,
`mm_all_reduce`, `grouped_matmul`, `routing` (npu_moe_*), `quantization`, or in the file of `attention` named after it.
`registry` shows how they reach the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwen2_npu.ops.attention.fused_infer_attention_score import npu_fused_infer_attention_score
from qwen2_npu.ops.attention.incre_flash_attention import npu_incre_flash_attention
from qwen2_npu.ops.attention.prompt_flash_attention import npu_prompt_flash_attention
from qwen2_npu.ops.grouped_matmul import npu_grouped_matmul
from qwen2_npu.ops.mm_all_reduce import npu_mm_all_reduce_base
from qwen2_npu.ops.norms import npu_add_rms_norm, npu_rms_norm
from qwen2_npu.ops.quantization import (
    npu_add_rms_norm_dynamic_quant,
    npu_dequant_swiglu_quant,
    npu_dynamic_quant,
    npu_quant_matmul,
    npu_weight_quant_batchmatmul,
)
from qwen2_npu.ops.registry import register
from qwen2_npu.ops.rotary import npu_apply_rotary_pos_emb, npu_rotary_mul
from qwen2_npu.ops.routing import npu_moe_finalize_routing, npu_moe_gating_top_k_softmax, npu_moe_init_routing_v2
from qwen2_npu.ops.scatter import (
    npu_scatter_pa_kv_cache,
    npu_scatter_pa_kv_cache_functional,
    scatter_update,
    scatter_update_,
)
from qwen2_npu.ops.schemas import SCHEMAS
from qwen2_npu.ops.swiglu import npu_swiglu

__all__ = ["SCHEMAS", "kernels"]

# Operator name -> the function that computes it on CPU and CUDA tensors.
kernels: dict[str, Callable[..., Any]] = {
    "npu_prompt_flash_attention": npu_prompt_flash_attention,
    "npu_incre_flash_attention": npu_incre_flash_attention,
    "npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu_rms_norm": npu_rms_norm,
    "npu_add_rms_norm": npu_add_rms_norm,
    "npu_apply_rotary_pos_emb": npu_apply_rotary_pos_emb,
    "npu_rotary_mul": npu_rotary_mul,
    "scatter_update_": scatter_update_,
    "scatter_update": scatter_update,
    "npu_scatter_pa_kv_cache": npu_scatter_pa_kv_cache,
    "npu_scatter_pa_kv_cache_functional": npu_scatter_pa_kv_cache_functional,
    "npu_swiglu": npu_swiglu,
    "npu_mm_all_reduce_base": npu_mm_all_reduce_base,
    "npu_moe_gating_top_k_softmax": npu_moe_gating_top_k_softmax,
    "npu_moe_init_routing_v2": npu_moe_init_routing_v2,
    "npu_grouped_matmul": npu_grouped_matmul,
    "npu_moe_finalize_routing": npu_moe_finalize_routing,
    "npu_weight_quant_batchmatmul": npu_weight_quant_batchmatmul,
    "npu_quant_matmul": npu_quant_matmul,
    "npu_dynamic_quant": npu_dynamic_quant,
    "npu_add_rms_norm_dynamic_quant": npu_add_rms_norm_dynamic_quant,
    "npu_dequant_swiglu_quant": npu_dequant_swiglu_quant,
}

_library = register(kernels)
