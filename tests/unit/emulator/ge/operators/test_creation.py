from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Case, floats

X = floats(2, 3)
ONE, LAST, STEP = torch.tensor(1), torch.tensor(9), torch.tensor(3)

CASES = [
    Case("ZerosLike", ge.ZerosLike, (X,), np.zeros_like),
    Case("OnesLike", ge.OnesLike, (X,), np.ones_like),
    Case("Fill", lambda v: ge.Fill([2, 3], v), (torch.tensor(2.5),), lambda v: np.full((2, 3), v)),
    Case("Fill", lambda v: ge.Fill([0], v), (torch.tensor(2.5),), lambda v: np.full((0,), v), note="empty"),
    Case("Range", ge.Range, (ONE, LAST, STEP), np.arange),
    Case(
        "Range", ge.Range, (torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.25)), np.arange, note="float",
    ),
    Case(
        "LinSpace", lambda a, b: ge.LinSpace(a, b, 5), (torch.tensor(-1.0), torch.tensor(1.0)),
        lambda a, b: np.linspace(a, b, 5), size=lambda a, b: 1.0,
    ),
    Case("Empty", lambda: ge.Empty([2, 3], dtype=0), (), lambda: np.full((2, 3), np.nan)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_what_is_not_initialised_is_easily_seen() -> None:
    (number,) = compute(lambda: ge.Empty([2], dtype=9))
    assert number.dtype == torch.int64
    assert number.tolist() == [85, 85]
