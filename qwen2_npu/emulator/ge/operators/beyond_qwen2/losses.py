"""GE operators of losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.table import Tensor, operator

REDUCTIONS = ("none", "mean", "sum")


@operator("NLLLoss")
def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, *, reduction: str = "mean", ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.nll_loss_forward(x, target.to(torch.int64), weight, REDUCTIONS.index(reduction), ignore_index)


@operator("MseLoss")
def mse_loss(predict: Tensor, label: Tensor, *, reduction: str = "mean") -> Tensor:
    return F.mse_loss(predict, label, reduction=reduction)
