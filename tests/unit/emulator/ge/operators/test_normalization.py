from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

X = floats(3, 4, 8)
HALF = X.half().float()


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def around(*values: object) -> float:
    """Normalised numbers lie within a few units of 0."""
    return 8.0


CASES = [
    Case("SoftmaxV2", lambda x: ge.SoftmaxV2(x, axes=[-1]), (X,), lambda x: softmax(x, -1), roundings=8),
    Case("SoftmaxV2", lambda x: ge.SoftmaxV2(x, axes=[1]), (X,), lambda x: softmax(x, 1), roundings=8, note="middle"),
    Case("LogSoftmaxV2", lambda x: ge.LogSoftmaxV2(x, axes=[-1]), (X,), lambda x: np.log(softmax(x, -1)), size=around),
    Case(
        "SoftmaxV2", lambda x: ge.SoftmaxV2(ge.Cast(x, dst_type=1), axes=[-1], half_to_float=True), (HALF,),
        lambda x: softmax(x, -1).astype(np.float32), roundings=8, halves=False, note="half to float",
    ),
    Case("LogSoftmaxV2", lambda x: ge.LogSoftmaxV2(x, axes=[0]), (X,), lambda x: np.log(softmax(x, 0)), size=around,
         note="first"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_softmax_to_float_keeps_float32() -> None:
    x = X.half()
    (got,) = compute(lambda x: ge.SoftmaxV2(x, axes=[-1], half_to_float=True), x)
    assert got.dtype is torch.float32
    assert np.allclose(got.numpy(), softmax(x.double().numpy(), -1), rtol=1e-6, atol=0)
