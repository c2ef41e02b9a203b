"""GE operators for activation functions, except Qwen2's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.table import Scalar, Tensor, operator

operator("Relu")(lambda x: torch.relu(x))
operator("Sigmoid")(lambda x: torch.sigmoid(x))
operator("HardSwish")(lambda x: F.hardswish(x))
operator("Mish")(lambda x: F.mish(x))
operator("LogSigmoid")(lambda x: F.logsigmoid(x))


@operator("Gelu")
def gelu(x: Tensor) -> Tensor:
    # The operator's documented formula is the one with tanh; torchair lowers both of PyTorch's forms to it.
    return F.gelu(x, approximate="tanh")


@operator("GeluV2")
def gelu_v2(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    return F.leaky_relu(x, negative_slope)


@operator("PRelu")
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    # torchair passes a weight that broadcasts already.
    return torch.where(x > 0, x, weight * x) if weight.dim() == x.dim() else F.prelu(x, weight)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return torch.ops.aten.elu(x, alpha, scale, input_scale)


@operator("HardSigmoid")
def hard_sigmoid(input_x: Tensor, *, alpha: float = 0.16666666, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * input_x + beta, 0, 1)


@operator("ThresholdV2")
def threshold(x: Tensor, threshold: Scalar, value: Scalar | None) -> Tensor:
    return F.threshold(x, threshold, 0.0 if value is None else value)


@operator("GLU")
def glu(x: Tensor, *, dim: int = -1) -> Tensor:
    return F.glu(x, dim)
