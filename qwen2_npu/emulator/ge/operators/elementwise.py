"""GE operators that compute element by element, with PyTorch's broadcasting."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen2_npu.emulator.ge.operators.table import Scalar, Tensor, operator
from qwen2_npu.emulator.ge.proto import UnsupportedGraphError, attribute_dtype

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "AddV2": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "RealDiv": torch.div,
    "Div": lambda a, b: torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "FloorDiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "TruncateDiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "FloorMod": torch.remainder,
    "Pow": torch.pow,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Equal": torch.eq,
    "NotEqual": torch.ne,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "SquaredDifference": lambda a, b: torch.square(a - b),
}
"""Operators of inputs x1 and x2."""

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "Invert": torch.bitwise_not,
    "IsInf": torch.isinf,
    "Log1p": torch.log1p,
    "LogicalNot": torch.logical_not,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Rsqrt": torch.rsqrt,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Square": torch.square,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
"""Operators of input x."""


def _enter_binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    operator(name)(lambda x1, x2: function(x1, x2))


def _enter_unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    operator(name)(lambda x: function(x))


for _name, _binary in BINARY.items():
    _enter_binary(_name, _binary)
for _name, _unary in UNARY.items():
    _enter_unary(_name, _unary)

# Base -1 is e.
operator("Exp", fixed={"base": -1.0, "scale": 1.0, "shift": 0.0})(lambda x: torch.exp(x))
operator("Erfinv")(lambda input_x: torch.erfinv(input_x))
operator("SelectV2")(lambda condition, then, else_: torch.where(condition, then, else_))
operator("MaskedFill")(lambda x, mask, value: torch.where(mask, value, x))
operator("Lerp")(lambda start, end, weight: torch.lerp(start, end, weight))
operator("ClipByValueV2")(
    lambda x, clip_value_min, clip_value_max: torch.minimum(torch.maximum(x, clip_value_min), clip_value_max)
)
operator("Complex", fixed={"Tout": 16})(lambda real, imag: torch.complex(real, imag))
operator("Real", fixed={"Tout": 0}, views="input")(lambda input: torch.real(input))
operator("Imag", fixed={"Tout": 0}, views="input")(lambda input: torch.imag(input))


LOGARITHMS: dict[float, Callable[[Tensor], Tensor]] = {-1.0: torch.log, 2.0: torch.log2, 10.0: torch.log10}
"""Base -> function; -1 is e."""


@operator("Log", fixed={"scale": 1.0, "shift": 0.0})
def log(x: Tensor, *, base: float = -1.0) -> Tensor:
    if base not in LOGARITHMS:
        raise UnsupportedGraphError(f"GE operator Log with base={base!r} is not emulated")
    return LOGARITHMS[base](x)


@operator("Addcmul")
def addcmul(input_data: Tensor, x1: Tensor, x2: Tensor, value: Scalar) -> Tensor:
    return torch.addcmul(input_data, x1, x2, value=value)


@operator("Addcdiv")
def addcdiv(input_data: Tensor, x1: Tensor, x2: Tensor, value: Scalar) -> Tensor:
    return torch.addcdiv(input_data, x1, x2, value=value)


@operator("AxpyV2")
def axpy_v2(x1: Tensor, x2: Tensor, alpha: Scalar) -> Tensor:
    return torch.add(x1, x2, alpha=alpha)


@operator("Sxpy")
def sxpy(x1: Tensor, x2: Tensor, alpha: Scalar | None) -> Tensor:
    return torch.sub(x1, x2, alpha=1 if alpha is None else alpha)


@operator("Adds")
def adds(x: Tensor, *, value: float) -> Tensor:
    return x + value


@operator("Muls")
def muls(x: Tensor, *, value: float) -> Tensor:
    return x * value


@operator("Cast", views="x")
def cast(x: Tensor, *, dst_type: int) -> Tensor:
    return x.to(attribute_dtype(dst_type))
