from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

A, B, BIAS = floats(3, 6), floats(6, 5, seed=1), floats(5, seed=2)
BATCH_A, BATCH_B = floats(2, 3, 6), floats(2, 6, 5, seed=1)


def magnitude(*operands: Array) -> Array:
    a, b, *bias = operands
    return np.abs(a) @ np.abs(b) + sum(np.abs(x) for x in bias)


def swapped(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


CASES = [
    Case("MatMul", lambda a, b: ge.MatMul(a, b, None), (A, B), np.matmul, size=magnitude, roundings=6),
    Case(
        "MatMul", lambda a, b: ge.MatMul(a, b, None, transpose_x1=True, transpose_x2=True),
        (A.T.contiguous(), B.T.contiguous()), lambda a, b: a.T @ b.T, size=lambda a, b: magnitude(a.T, b.T),
        roundings=6, note="transposed",
    ),
    Case("MatMul", ge.MatMul, (A, B, BIAS), lambda a, b, c: a @ b + c, size=magnitude, roundings=8, note="bias"),
    Case("MatMulV2", lambda a, b: ge.MatMulV2(a, b, None, None), (A, B), np.matmul, size=magnitude, roundings=6),
    Case(
        "MatMulV2", lambda a, b: ge.MatMulV2(a, b, None, None), (BATCH_A, B), np.matmul, size=magnitude, roundings=6,
        note="three dimensions",
    ),
    Case(
        "MatMulV2", lambda a, b, c: ge.MatMulV2(a, b, c, None, transpose_x2=True), (A, B.T.contiguous(), BIAS),
        lambda a, b, c: a @ b.T + c, size=lambda a, b, c: magnitude(a, b.T, c), roundings=8, note="bias",
    ),
    Case("BatchMatMul", ge.BatchMatMul, (BATCH_A, BATCH_B), np.matmul, size=magnitude, roundings=6),
    Case(
        "BatchMatMul", lambda a, b: ge.BatchMatMul(a, b, adj_x1=True, adj_x2=True),
        (BATCH_A.mT.contiguous(), BATCH_B.mT.contiguous()), lambda a, b: swapped(a) @ swapped(b),
        size=lambda a, b: magnitude(swapped(a), swapped(b)), roundings=6, note="transposed",
    ),
    Case(
        "BatchMatMulV2", lambda a, b, c: ge.BatchMatMulV2(a, b, c, None), (BATCH_A, BATCH_B, BIAS),
        lambda a, b, c: a @ b + c, size=magnitude, roundings=8,
    ),
    Case(
        "MatMulV2", lambda a, b: ge.MatMulV2(a, b, None, None, transpose_x1=True), (A.T.contiguous(), B),
        lambda a, b: a.T @ b, size=lambda a, b: magnitude(a.T, b), roundings=6, note="transposed",
    ),
    Case(
        "BatchMatMulV2", lambda a, b: ge.BatchMatMulV2(a, b, None, None, adj_x1=True, adj_x2=True),
        (BATCH_A.mT.contiguous(), BATCH_B.mT.contiguous()), lambda a, b: swapped(a) @ swapped(b),
        size=lambda a, b: magnitude(swapped(a), swapped(b)), roundings=6, note="transposed",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_a_bias_is_added_before_the_product_is_rounded() -> None:
    """64 · 32 + 1 is no number of float16, and with the bias of 1 it is."""
    a, b, bias = (torch.tensor(values).half() for values in ([[64.0, 1.0]], [[32.0], [1.0]], [1.0]))
    assert compute(ge.MatMul, a, b, bias)[0].tolist() == [[2050]]


def test_a_product_of_the_wrong_side_is_seen() -> None:
    wrong = Case("MatMul", lambda a, b: ge.MatMul(b, a, None), (A, B[:, :3].contiguous()), np.matmul)
    with pytest.raises(AssertionError, match="shape"):
        wrong.check(torch.float32)
