"""GE operators that normalise: softmax and its logarithm."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.ge.operators.table import Tensor, operator


@operator("SoftmaxV2")
def softmax(x: Tensor, *, axes: tuple[int, ...] = (-1,), half_to_float: bool = False) -> Tensor:
    return torch.softmax(x, axes[0], dtype=torch.float32 if half_to_float else None)


@operator("LogSoftmaxV2")
def log_softmax(logits: Tensor, *, axes: tuple[int, ...] = (-1,)) -> Tensor:
    return torch.log_softmax(logits, axes[0])
