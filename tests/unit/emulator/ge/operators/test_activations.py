from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

X = torch.cat((floats(3, 8) * 3, torch.zeros(1, 8)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


CASES = [
    Case("Swish", ge.Swish, (X,), lambda x: x * sigmoid(x), roundings=4),
    Case("Swish", lambda x: ge.Swish(x, scale=2.0), (X,), lambda x: x * sigmoid(2 * x), roundings=6, note="scaled"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)
