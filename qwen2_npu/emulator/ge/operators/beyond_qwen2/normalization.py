"""GE operators that normalise: layer, group and batch norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator

HALVES = (torch.float16, torch.bfloat16)


@operator("LayerNormV4")
def layer_norm(
    x: Tensor, normalized_shape: Ints, gamma: Tensor | None, beta: Tensor | None, *, epsilon: float = 1e-5
) -> tuple[Tensor, ...]:
    y, mean, rstd = torch.native_layer_norm(x, list(normalized_shape), gamma, beta, epsilon)
    if x.dtype in HALVES:
        # Hardware keeps the statistics in float32.
        _, mean, rstd = torch.native_layer_norm(x.float(), list(normalized_shape), None, None, epsilon)
    return y, mean, rstd


@operator("GroupNorm", fixed={"data_format": "NHWC", "is_training": True})
def group_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, *, num_groups: int, eps: float = 0.0001
) -> tuple[Tensor, Tensor, Tensor]:
    # The layout is that of the tensors, NCHW; torchair leaves the attribute alone.
    grouped = x.float().reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    return F.group_norm(x, num_groups, gamma, beta, eps), mean.to(x.dtype), variance.to(x.dtype)


@operator("BNInfer")
def bn_infer(x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, offset, False, 0.0, epsilon)
