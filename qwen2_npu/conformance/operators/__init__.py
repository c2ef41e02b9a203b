"""The operator catalogue: per operator its samples, float64 golden, derived tolerances and invalid inputs.

In the spirit of PyTorch's OpInfo: one record per operator, in the file that bears its name, consumed by every
suite. Goldens are numpy, written from the operators' documentation and not from any kernel. To add an
operator, write its file and add it to ``_RECORDS``.
"""

from __future__ import annotations

from qwen2_npu.conformance.operators import (
    add_rms_norm,
    add_rms_norm_dynamic_quant,
    apply_rotary_pos_emb,
    dequant_swiglu_quant,
    dynamic_quant,
    fused_infer_attention_score,
    grouped_matmul,
    incre_flash_attention,
    mm_all_reduce,
    moe_finalize_routing,
    moe_gating_top_k_softmax,
    moe_init_routing_v2,
    prompt_flash_attention,
    quant_matmul,
    rms_norm,
    rotary_mul,
    scatter_pa_kv_cache,
    scatter_update,
    swiglu,
    weight_quant_batchmatmul,
)
from qwen2_npu.conformance.operators.check import check, compare, compare_all
from qwen2_npu.conformance.operators.record import DTYPES, Expected, Invalid, OperatorRecord, Sample, Skip

_RECORDS = (
    prompt_flash_attention.OPERATOR,
    incre_flash_attention.OPERATOR,
    fused_infer_attention_score.OPERATOR,
    rms_norm.OPERATOR,
    add_rms_norm.OPERATOR,
    apply_rotary_pos_emb.OPERATOR,
    rotary_mul.OPERATOR,
    scatter_update.OUT_OF_PLACE,
    scatter_update.IN_PLACE,
    scatter_pa_kv_cache.OUT_OF_PLACE,
    scatter_pa_kv_cache.IN_PLACE,
    swiglu.OPERATOR,
    mm_all_reduce.OPERATOR,
    moe_gating_top_k_softmax.OPERATOR,
    moe_init_routing_v2.OPERATOR,
    grouped_matmul.OPERATOR,
    moe_finalize_routing.OPERATOR,
    weight_quant_batchmatmul.OPERATOR,
    quant_matmul.OPERATOR,
    dynamic_quant.OPERATOR,
    add_rms_norm_dynamic_quant.OPERATOR,
    dequant_swiglu_quant.OPERATOR,
)

CATALOGUE: dict[str, OperatorRecord] = {record.name: record for record in _RECORDS}

__all__ = [
    "CATALOGUE",
    "DTYPES",
    "Expected",
    "Invalid",
    "OperatorRecord",
    "Sample",
    "Skip",
    "check",
    "compare",
    "compare_all",
]
