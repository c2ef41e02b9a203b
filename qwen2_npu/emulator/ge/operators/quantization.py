"""GE operators of 8-bit weights; the arithmetic is that of ``qwen2_npu.ops``, which refuses what is not emulated."""

from __future__ import annotations

import torch

from qwen2_npu import ops
from qwen2_npu.emulator.ge.operators.table import Tensor, operator

GE_INT8 = 2
GE_DTYPES = {1: torch.float16, 3: torch.int32, 27: torch.bfloat16}
"""GE's numbers of the dtypes that a quantised product has."""


@operator("WeightQuantBatchMatmulV2", fixed={"transpose_x": False, "transpose_weight": False, "dtype": -1})
def weight_quant_batch_matmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    *,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
) -> Tensor:
    return ops.kernels["npu_weight_quant_batchmatmul"](
        x,
        weight,
        antiquant_scale,
        antiquant_offset,
        quant_scale,
        quant_offset,
        bias,
        antiquant_group_size=antiquant_group_size,
        inner_precise=inner_precise,
    )


@operator("QuantBatchMatmulV3", fixed={"transpose_x1": False, "transpose_x2": False, "group_size": 0})
def quant_batch_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    pertoken_scale: Tensor | None,
    *,
    dtype: int,
) -> Tensor:
    return ops.kernels["npu_quant_matmul"](
        x1,
        x2,
        scale,
        offset=offset,
        pertoken_scale=pertoken_scale,
        bias=bias,
        output_dtype=GE_DTYPES.get(dtype, torch.int8),
    )


@operator("DynamicQuant", fixed={"dst_type": GE_INT8})
def dynamic_quant(x: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_dynamic_quant"](x, smooth_scales=smooth_scales, group_index=group_index)


@operator("AddRmsNormDynamicQuant", fixed={"dst_type": GE_INT8})
def add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scale1: Tensor | None,
    smooth_scale2: Tensor | None,
    beta: Tensor | None,
    *,
    epsilon: float = 1e-6,
    output_mask: tuple[bool, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return ops.kernels["npu_add_rms_norm_dynamic_quant"](
        x1,
        x2,
        gamma,
        smooth_scale1=smooth_scale1,
        smooth_scale2=smooth_scale2,
        beta=beta,
        epsilon=epsilon,
        output_mask=list(output_mask) or None,
    )


@operator(
    "DequantSwigluQuant",
    fixed={
        **{"quant_mode": "dynamic", "dst_type": GE_INT8, "round_mode": "rint", "activate_dim": -1, "swiglu_mode": 0},
        **{"clamp_limit": 7.0, "glu_alpha": 1.702, "glu_bias": 1.0},
    },
)
def dequant_swiglu_quant(
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    group_index: Tensor | None,
    *,
    activate_left: bool = False,
) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_dequant_swiglu_quant"](
        x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        bias=bias,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=1,
    )
