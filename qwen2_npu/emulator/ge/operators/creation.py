"""GE operators that make tensors from numbers."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.ge.operators.table import Ints, Scalar, Tensor, operator
from qwen2_npu.emulator.ge.proto import attribute_dtype

operator("ZerosLike")(lambda x: torch.zeros_like(x))
operator("OnesLike")(lambda x: torch.ones_like(x))


@operator("Fill")
def fill(dims: Ints, value: Tensor) -> Tensor:
    return value.reshape(()).expand(dims).clone()


@operator("Range")
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operator("LinSpace")
def lin_space(start: Tensor, stop: Scalar, num: Ints) -> Tensor:
    # torchair passes whole numbers as integers, and expects floats.
    dtype = start.dtype if start.is_floating_point() else torch.float32
    return torch.linspace(start.item(), stop, num[0], dtype=dtype)


@operator("Empty", fixed={"init": False})
def empty(shape: Ints, *, dtype: int = 3) -> Tensor:
    # Uninitialised on hardware; a pattern that is easily seen where somebody reads it.
    made = torch.empty(shape, dtype=attribute_dtype(dtype))
    return made.fill_(float("nan") if made.is_floating_point() else 85)
