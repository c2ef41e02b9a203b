"""GE operators that copy, gather and scatter."""

from __future__ import annotations

import torch

from qwen2_npu import ops
from qwen2_npu.emulator.ge.operators.table import Tensor, operator
from qwen2_npu.emulator.ge.proto import Node, UnsupportedGraphError


@operator("TensorMove")
def tensor_move(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@operator("Assign", writes=(0,))
def assign(ref: Tensor, value: Tensor) -> Tensor:
    return ref.copy_(value)


@operator("Scatter", writes=(0,))
def scatter(var: Tensor, indices: Tensor, updates: Tensor, *, reduce: str, axis: int = 0, node: Node) -> Tensor:
    if reduce != "update":
        raise UnsupportedGraphError(f"GE operator Scatter ({node.name}) with reduce={reduce!r} is not emulated")
    return ops.kernels["scatter_update_"](var, indices, updates, axis)


@operator("GatherV2")
def gather_v2(x: Tensor, indices: Tensor, axis: Tensor, *, batch_dims: int = 0, node: Node) -> Tensor:
    if batch_dims:
        raise UnsupportedGraphError(f"GE operator GatherV2 ({node.name}) with batch_dims is not emulated")
    dim = int(axis)
    picked = x.index_select(dim, indices.reshape(-1))
    return picked.reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])


@operator("GatherElements")
def gather_elements(x: Tensor, index: Tensor, *, dim: int = 0) -> Tensor:
    return torch.gather(x, dim, index)


@operator("IndexByTensor", variadic=True)
def index_by_tensor(inputs: list[Tensor], *, indices_mask: list[int]) -> Tensor:
    x, *given = inputs
    left = iter(given)
    return x[tuple(next(left) if present else slice(None) for present in indices_mask)]


@operator("Fill")
def fill(dims: Tensor, value: Tensor) -> Tensor:
    return value.reshape(()).expand(dims.tolist()).clone()


@operator("Range")
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operator("ZerosLike")
def zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x)
