from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.emulator.ge.operators.elementwise import BINARY, UNARY
from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Case, booleans, floats, integers

X, Y = floats(3, 4), floats(3, 4, seed=1)
POSITIVE = floats(3, 4, seed=2, low=0.1, high=3.0)
INSIDE = floats(3, 4, seed=3, low=-0.9, high=0.9)  # where arcsine and its like are defined
WHOLE, NONZERO = integers(3, 4, low=-9), integers(3, 4, low=1, seed=1)

erf = np.vectorize(math.erf, otypes=[float])

UNARY_REFERENCES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "Abs": (X, np.abs),
    "Acos": (INSIDE, np.arccos),
    "Acosh": (POSITIVE + 1, np.arccosh),
    "Asin": (INSIDE, np.arcsin),
    "Asinh": (X, np.arcsinh),
    "Atan": (X, np.arctan),
    "Atanh": (INSIDE, np.arctanh),
    "Ceil": (X, np.ceil),
    "Cos": (X, np.cos),
    "Cosh": (X, np.cosh),
    "Erf": (X, erf),
    "Expm1": (X, np.expm1),
    "Floor": (X, np.floor),
    "Invert": (WHOLE, np.invert),
    "IsInf": (torch.tensor([1.0, math.inf, -math.inf, math.nan]), np.isinf),
    "Log1p": (POSITIVE, np.log1p),
    "LogicalNot": (booleans(3, 4), np.logical_not),
    "Neg": (X, np.negative),
    "Reciprocal": (POSITIVE, lambda x: 1 / x),
    "Round": (torch.tensor([0.5, 1.5, 2.5, -0.5, 2.4]), np.rint),  # halves go to the even neighbour
    "Rsqrt": (POSITIVE, lambda x: 1 / np.sqrt(x)),
    "Sign": (torch.tensor([-2.0, 0.0, 3.0]), np.sign),
    "Sin": (X, np.sin),
    "Sinh": (X, np.sinh),
    "Sqrt": (POSITIVE, np.sqrt),
    "Square": (X, np.square),
    "Tan": (INSIDE, np.tan),
    "Tanh": (X, np.tanh),
}

BINARY_REFERENCES: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
    "Add": (X, Y, np.add),
    "AddV2": (X, Y, np.add),
    "Sub": (X, Y, np.subtract),
    "Mul": (X, Y[:1], np.multiply),
    "RealDiv": (X, POSITIVE, np.divide),
    "Div": (WHOLE, NONZERO, lambda a, b: np.trunc(a / b).astype(np.int64)),
    "FloorDiv": (WHOLE, NONZERO, np.floor_divide),
    "TruncateDiv": (WHOLE, NONZERO, lambda a, b: np.trunc(a / b).astype(np.int64)),
    "FloorMod": (WHOLE, NONZERO, np.mod),
    "Pow": (POSITIVE, X, np.power),
    "Maximum": (X, Y, np.maximum),
    "Minimum": (X, Y, np.minimum),
    "Equal": (WHOLE, NONZERO, np.equal),
    "NotEqual": (WHOLE, NONZERO, np.not_equal),
    "Less": (X, Y, np.less),
    "LessEqual": (WHOLE, NONZERO, np.less_equal),
    "Greater": (X, Y, np.greater),
    "GreaterEqual": (WHOLE, NONZERO, np.greater_equal),
    "LogicalAnd": (booleans(3, 4), booleans(3, 4, seed=1), np.logical_and),
    "LogicalOr": (booleans(3, 4), booleans(3, 4, seed=1), np.logical_or),
    "BitwiseAnd": (WHOLE, NONZERO, np.bitwise_and),
    "BitwiseOr": (WHOLE, NONZERO, np.bitwise_or),
    "BitwiseXor": (WHOLE, NONZERO, np.bitwise_xor),
    "SquaredDifference": (X, Y, lambda a, b: (a - b) ** 2),
}


def _unary(name: str) -> Case:
    x, reference = UNARY_REFERENCES[name]
    return Case(name, lambda x: getattr(ge, name)(x), (x,), reference)


def _binary(name: str) -> Case:
    a, b, reference = BINARY_REFERENCES[name]
    if name == "SquaredDifference":  # the difference is rounded before it is squared
        return Case(name, getattr(ge, name), (a, b), reference, roundings=4)
    if name == "Pow":  # ln(x1) is rounded before it is multiplied
        return Case(name, getattr(ge, name), (a, b), reference, roundings=4)
    return Case(name, lambda a, b: getattr(ge, name)(a, b), (a, b), reference)


HALF, MIX = torch.tensor(0.5), floats(3, 4, seed=5)
COMPLEX = torch.complex(X, Y)

CASES = [
    *(_unary(name) for name in UNARY),
    *(_binary(name) for name in BINARY),
    Case("RealDiv", ge.RealDiv, (WHOLE.float(), NONZERO.float()), np.divide, note="whole"),
    Case("Div", ge.Div, (X, POSITIVE), np.divide, note="float"),
    Case("Exp", ge.Exp, (X,), np.exp),
    Case("Log", ge.Log, (POSITIVE,), np.log, size=lambda x: 1.0),
    Case("Log", lambda x: ge.Log(x, base=2.0), (POSITIVE,), np.log2, size=lambda x: 1.0, note="base 2"),
    Case("Log", lambda x: ge.Log(x, base=10.0), (POSITIVE,), np.log10, size=lambda x: 1.0, note="base 10"),
    Case(
        "Erfinv", ge.Erfinv, (floats(200, low=-0.99, high=0.99),),
        lambda x: torch.erfinv(torch.from_numpy(x)).numpy(), roundings=4,
    ),
    Case("SelectV2", ge.SelectV2, (booleans(3, 4), X, Y), np.where),
    Case("MaskedFill", ge.MaskedFill, (X, booleans(4), HALF), lambda x, mask, v: np.where(mask, v, x)),
    Case("Lerp", ge.Lerp, (X, Y, HALF), lambda a, b, w: a + w * (b - a), size=lambda a, b, w: np.abs(a) + np.abs(b)),
    Case(
        "ClipByValueV2", ge.ClipByValueV2, (X, torch.tensor(-0.5), torch.tensor(0.25)), np.clip,
    ),
    Case("ClipByValueV2", ge.ClipByValueV2, (X, Y - 1, Y + 1), np.clip, note="tensors"),
    Case(
        "Addcmul", ge.Addcmul, (X, Y, MIX, HALF), lambda x, a, b, v: x + v * a * b,
        size=lambda x, a, b, v: np.abs(x) + np.abs(v * a * b), roundings=4,
    ),
    Case(
        "Addcdiv", ge.Addcdiv, (X, Y, POSITIVE, HALF), lambda x, a, b, v: x + v * a / b,
        size=lambda x, a, b, v: np.abs(x) + np.abs(v * a / b), roundings=4,
    ),
    Case("Complex", ge.Complex, (X, Y), lambda a, b: a + 1j * b, halves=False),
    Case("Real", ge.Real, (COMPLEX,), np.real),
    Case("Imag", ge.Imag, (COMPLEX,), np.imag),
    Case("AxpyV2", ge.AxpyV2, (WHOLE, NONZERO, torch.tensor(2)), lambda a, b, alpha: a + alpha * b),
    Case("Sxpy", ge.Sxpy, (WHOLE, NONZERO, torch.tensor(2)), lambda a, b, alpha: a - alpha * b),
    Case("Sxpy", lambda a, b: ge.Sxpy(a, b, None), (WHOLE, NONZERO), lambda a, b: a - b, note="without alpha"),
    Case("Adds", lambda x: ge.Adds(x, value=0.5), (X,), lambda x: x + 0.5),
    Case("Muls", lambda x: ge.Muls(x, value=0.25), (X,), lambda x: x * 0.25),
    Case("Cast", lambda x: ge.Cast(x, dst_type=9), (X * 5,), lambda x: np.trunc(x).astype(np.int64), note="int64"),
    Case("Cast", lambda x: ge.Cast(x, dst_type=12), (torch.tensor([0.0, 0.5, 2.0]),), lambda x: x != 0, note="bool"),
    Case("Cast", lambda x: ge.Cast(x, dst_type=27), (X,), lambda x: x, note="bfloat16"),
    Case("Cast", lambda x: ge.Cast(x, dst_type=1), (X,), lambda x: x, note="float16"),
    Case("Adds", lambda x: ge.Adds(x, value=-2.0), (X,), lambda x: x - 2, size=lambda x: np.abs(x) + 2, note="minus"),
    Case("Muls", lambda x: ge.Muls(x, value=-2.0), (X,), lambda x: -2 * x, note="minus"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_cast_rounds_to_the_nearest_and_ties_to_even() -> None:
    tie = 1 + 2.0**-8  # half way between two neighbours in bfloat16
    (got,) = compute(lambda x: ge.Cast(x, dst_type=27), torch.tensor([tie, tie + 2.0**-20]))
    assert got.tolist() == [1.0, 1 + 2.0**-7]


@pytest.mark.parametrize("case", [CASES[0], CASES[len(UNARY)]], ids=str)
def test_a_wrong_operator_is_seen(case: Case) -> None:
    wrong = Case(case.type, lambda *x: ge.Cos(x[0]), case.inputs, case.expected)
    with pytest.raises(AssertionError, match="output 0"):
        wrong.check(torch.float32)
