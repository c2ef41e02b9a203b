from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

X = torch.cat((floats(3, 8) * 3, torch.zeros(1, 8)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log1p_exp(x: Array) -> Array:
    return np.logaddexp(0, x)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def glu(x: Array) -> Array:
    first, second = np.split(x, 2, axis=1)
    return first * sigmoid(second)


WEIGHT = floats(1, 8, seed=1)

CASES = [
    Case("Relu", ge.Relu, (X,), lambda x: np.maximum(x, 0)),
    Case("Sigmoid", ge.Sigmoid, (X,), sigmoid),
    Case("HardSwish", ge.HardSwish, (X,), lambda x: x * np.clip(x + 3, 0, 6) / 6, size=np.abs, roundings=4),
    Case("Mish", ge.Mish, (X,), lambda x: x * np.tanh(log1p_exp(x)), roundings=4),
    Case("LogSigmoid", ge.LogSigmoid, (X,), lambda x: -log1p_exp(-x), size=lambda x: 1.0),
    # 1 + tanh cancels for negative x, so the error is relative to x.
    Case("Gelu", ge.Gelu, (X,), gelu_tanh, size=np.abs, roundings=4),
    Case("GeluV2", ge.GeluV2, (X,), gelu_erf, size=np.abs, roundings=4),
    Case("GeluV2", lambda x: ge.GeluV2(x, approximate="tanh"), (X,), gelu_tanh, size=np.abs, roundings=4, note="tanh"),
    Case("LeakyRelu", lambda x: ge.LeakyRelu(x, negative_slope=0.25), (X,), lambda x: np.where(x > 0, x, 0.25 * x)),
    Case("PRelu", ge.PRelu, (X, WEIGHT), lambda x, w: np.where(x > 0, x, w * x)),
    Case("PRelu", ge.PRelu, (X, WEIGHT[0]), lambda x, w: np.where(x > 0, x, w * x), note="per channel"),
    Case("Elu", ge.Elu, (X,), lambda x: np.where(x > 0, x, np.expm1(x))),
    Case(
        "Elu", lambda x: ge.Elu(x, alpha=0.5, scale=2.0, input_scale=0.25), (X,),
        lambda x: 2 * np.where(x > 0, x, 0.5 * np.expm1(x / 4)), roundings=4, note="scaled",
    ),
    Case(
        "HardSigmoid", lambda x: ge.HardSigmoid(x, alpha=0.125, beta=0.5), (X,),
        lambda x: np.clip(x / 8 + 0.5, 0, 1), size=lambda x: 1.0,
    ),
    Case(
        "ThresholdV2", lambda x: ge.ThresholdV2(x, 0.5, -2.0), (X,), lambda x: np.where(x > 0.5, x, -2.0),
    ),
    Case("GLU", lambda x: ge.GLU(x, dim=1), (X,), glu, roundings=4),
    Case(
        "HardSigmoid", lambda x: ge.HardSigmoid(x, alpha=0.25, beta=0.125), (X,),
        lambda x: np.clip(x / 4 + 0.125, 0, 1), size=lambda x: 1.0, note="beta",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_the_two_forms_of_gelu_are_told_apart() -> None:
    with pytest.raises(AssertionError, match="output 0"):
        Case("Gelu", ge.Gelu, (X,), gelu_erf, size=np.abs, roundings=4).check(torch.float32)
