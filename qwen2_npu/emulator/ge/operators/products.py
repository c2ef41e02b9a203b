"""GE operators that multiply matrices."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.ge.operators.table import Tensor, operator


@operator("MatMul")
def matmul(
    x1: Tensor, x2: Tensor, bias: Tensor | None, *, transpose_x1: bool = False, transpose_x2: bool = False
) -> Tensor:
    a = x1.mT if transpose_x1 else x1
    b = x2.mT if transpose_x2 else x2
    if bias is None:
        return torch.matmul(a, b)
    return torch.addmm(bias, a, b) if bias.dtype == a.dtype else (torch.matmul(a, b) + bias).to(a.dtype)


operator("MatMulV2", fixed={"offset_x": 0})(matmul)


@operator("BatchMatMul")
def batch_matmul(x1: Tensor, x2: Tensor, *, adj_x1: bool = False, adj_x2: bool = False) -> Tensor:
    return torch.matmul(x1.mT if adj_x1 else x1, x2.mT if adj_x2 else x2)


@operator("BatchMatMulV2", fixed={"offset_x": 0})
def batch_matmul_v2(
    x1: Tensor, x2: Tensor, bias: Tensor | None, *, adj_x1: bool = False, adj_x2: bool = False
) -> Tensor:
    out = batch_matmul(x1, x2, adj_x1=adj_x1, adj_x2=adj_x2)
    return out if bias is None else out + bias
