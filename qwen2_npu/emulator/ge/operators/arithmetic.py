"""GE operators that compute element by element, reduce, or multiply matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.table import Tensor, operator
from qwen2_npu.emulator.ge.proto import Node, UnsupportedGraphError, attribute_dtype

operator("Add", "AddV2")(lambda x1, x2: x1 + x2)
operator("Sub")(lambda x1, x2: x1 - x2)
operator("Mul")(lambda x1, x2: x1 * x2)
operator("RealDiv", "Div")(lambda x1, x2: torch.div(x1, x2))
operator("Maximum")(lambda x1, x2: torch.maximum(x1, x2))
operator("Minimum")(lambda x1, x2: torch.minimum(x1, x2))
operator("Pow")(lambda x1, x2: torch.pow(x1, x2))
operator("Equal")(lambda x1, x2: x1 == x2)
operator("NotEqual")(lambda x1, x2: x1 != x2)
operator("Less")(lambda x1, x2: x1 < x2)
operator("LessEqual")(lambda x1, x2: x1 <= x2)
operator("Greater")(lambda x1, x2: x1 > x2)
operator("GreaterEqual")(lambda x1, x2: x1 >= x2)
operator("LogicalAnd")(lambda x1, x2: x1 & x2)
operator("LogicalOr")(lambda x1, x2: x1 | x2)
operator("LogicalNot")(lambda x: ~x)
operator("Neg")(lambda x: -x)
operator("Abs")(lambda x: torch.abs(x))
operator("Exp")(lambda x: torch.exp(x))
operator("Log")(lambda x: torch.log(x))
operator("Sqrt")(lambda x: torch.sqrt(x))
operator("Rsqrt")(lambda x: torch.rsqrt(x))
operator("Square")(lambda x: torch.square(x))
operator("Reciprocal")(lambda x: torch.reciprocal(x))
operator("Cos")(lambda x: torch.cos(x))
operator("Sin")(lambda x: torch.sin(x))
operator("Tanh")(lambda x: torch.tanh(x))
operator("Relu")(lambda x: torch.relu(x))
operator("Sigmoid")(lambda x: torch.sigmoid(x))
operator("SelectV2", "Select")(lambda condition, then1, else1: torch.where(condition, then1, else1))


@operator("Swish")
def swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    return F.silu(x) if scale == 1.0 else x * torch.sigmoid(scale * x)


@operator("Cast")
def cast(x: Tensor, *, dst_type: int) -> Tensor:
    return x.to(attribute_dtype(dst_type))


@operator("MatMul", "MatMulV2", "MatMulV3")
def matmul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    offset_w: Tensor | None,
    *,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    offset_x: int = 0,
    node: Node,
) -> Tensor:
    if offset_w is not None or offset_x:
        raise UnsupportedGraphError(f"GE operator {node.type} ({node.name}) with an offset is not emulated")
    a = x1.mT if transpose_x1 else x1
    b = x2.mT if transpose_x2 else x2
    if bias is None:
        return torch.matmul(a, b)
    return torch.addmm(bias, a, b) if bias.dtype == a.dtype else (torch.matmul(a, b) + bias).to(a.dtype)


@operator("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def batch_matmul(
    x1: Tensor, x2: Tensor, bias: Tensor | None = None, *, adj_x1: bool = False, adj_x2: bool = False
) -> Tensor:
    out = torch.matmul(x1.mT if adj_x1 else x1, x2.mT if adj_x2 else x2)
    return out if bias is None else out + bias


def _axes(axes: Tensor, x: Tensor) -> list[int]:
    found = axes.reshape(-1).tolist()
    return found or list(range(x.dim()))


@operator("ReduceMean", "ReduceMeanD")
def reduce_mean(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    return x.mean(_axes(axes, x), keepdim=keep_dims)


@operator("ReduceSum", "ReduceSumD")
def reduce_sum(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    return x.sum(_axes(axes, x), keepdim=keep_dims, dtype=x.dtype)


@operator("ReduceMax")
def reduce_max(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    return x.amax(_axes(axes, x), keepdim=keep_dims)


@operator("SoftmaxV2")
def softmax(x: Tensor, *, axes: tuple[int, ...] = (-1,), half_to_float: bool = False) -> Tensor:
    return torch.softmax(x, axes[0], dtype=torch.float32 if half_to_float else None)


@operator("Cumsum")
def cumsum(x: Tensor, axis: Tensor, *, exclusive: bool = False, reverse: bool = False, node: Node) -> Tensor:
    if exclusive or reverse:
        raise UnsupportedGraphError(f"GE operator Cumsum ({node.name}), exclusive or reversed, is not emulated")
    return torch.cumsum(x, int(axis), dtype=x.dtype)
