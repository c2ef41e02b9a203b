from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

X, GAMMA, BETA = floats(3, 4, 8), floats(8, seed=1), floats(8, seed=2)
IMAGE, SCALE, OFFSET = floats(2, 6, 3, 4), floats(6, seed=1), floats(6, seed=2)
MEAN, VARIANCE = floats(6, seed=3), floats(6, seed=4, low=0.5, high=2.0)
EPSILON = 0.125


def layer_norm(x: Array, gamma: Array, beta: Array) -> tuple[Array, Array, Array]:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    rstd = 1 / np.sqrt(variance + EPSILON)
    return (x - mean) * rstd * gamma + beta, mean, rstd


def group_norm(
    x: Array, gamma: Array, beta: Array, groups: int = 3, epsilon: float = EPSILON
) -> tuple[Array, Array, Array]:
    grouped = x.reshape(2, groups, -1)
    mean, variance = grouped.mean(-1), grouped.var(-1)
    normal = (grouped - mean[..., None]) / np.sqrt(variance[..., None] + epsilon)
    return normal.reshape(x.shape) * per_channel(gamma) + per_channel(beta), mean, variance


def per_channel(values: Array) -> Array:
    return values[:, None, None]


def bn_infer(x: Array, scale: Array, offset: Array, mean: Array, variance: Array, epsilon: float = EPSILON) -> Array:
    normal = (x - per_channel(mean)) / np.sqrt(per_channel(variance) + epsilon)
    return normal * per_channel(scale) + per_channel(offset)


def around(*values: object) -> float:
    """Normalised numbers lie within a few units of 0."""
    return 8.0


CASES = [
    Case(
        "LayerNormV4", lambda x, g, b: ge.LayerNormV4(x, [8], gamma=g, beta=b, epsilon=EPSILON), (X, GAMMA, BETA),
        layer_norm, size=lambda *_: (8.0, 8.0, 8.0),
    ),
    Case(
        "LayerNormV4", lambda x: ge.LayerNormV4(x, [8], gamma=None, beta=None, epsilon=EPSILON), (X,),
        lambda x: layer_norm(x, np.ones(8), np.zeros(8)), size=lambda *_: (8.0, 8.0, 8.0), note="plain",
    ),
    Case(
        "GroupNorm", lambda x, g, b: ge.GroupNorm(x, g, b, num_groups=3, eps=EPSILON), (IMAGE, SCALE, OFFSET),
        group_norm, size=lambda *_: (8.0, 8.0, 8.0),
    ),
    Case(
        "BNInfer", lambda *tensors: ge.BNInfer(*tensors, epsilon=EPSILON), (IMAGE, SCALE, OFFSET, MEAN, VARIANCE),
        bn_infer, size=around,
    ),
    Case(
        "GroupNorm", lambda x, g, b: ge.GroupNorm(x, g, b, num_groups=2, eps=2.0), (IMAGE, SCALE, OFFSET),
        lambda *tensors: group_norm(*tensors, groups=2, epsilon=2.0), size=lambda *_: (8.0, 8.0, 8.0), note="two",
    ),
    Case(
        "BNInfer", lambda *tensors: ge.BNInfer(*tensors, epsilon=2.0), (IMAGE, SCALE, OFFSET, MEAN, VARIANCE),
        lambda *tensors: bn_infer(*tensors, epsilon=2.0), size=around, note="large epsilon",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_statistics_of_halves_are_float32() -> None:
    _, mean, rstd = compute(lambda x: ge.LayerNormV4(x, [8], gamma=None, beta=None), X.bfloat16())
    assert (mean.dtype, rstd.dtype) == (torch.float32, torch.float32)
