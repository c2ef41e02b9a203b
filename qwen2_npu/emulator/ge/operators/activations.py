"""GE operators for activation functions: SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.table import Tensor, operator


@operator("Swish")
def swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    if scale == 1.0:
        return F.silu(x)
    wide = x.float()
    return (wide * torch.sigmoid(scale * wide)).to(x.dtype)
