from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

LOGS = -floats(5, 4, low=0.1, high=3.0)
TARGET = torch.tensor([1, 3, 0, 3, 2], dtype=torch.int32)
WEIGHT = floats(4, seed=1, low=0.5, high=2.0)
IGNORED = 3


def picked(x: Array, target: Array, weight: Array) -> tuple[Array, Array]:
    """Loss and weight per row; ignored rows have neither."""
    w = np.where(target == IGNORED, 0.0, weight[target])
    return -x[np.arange(len(target)), target] * w, w


def nll(reduction: str):  # type: ignore[no-untyped-def]
    def reference(x: Array, target: Array, weight: Array) -> tuple[Array, Array]:
        loss, w = picked(x, target, weight)
        if reduction == "none":
            return loss, np.array(0.0)
        return (loss.sum() / w.sum() if reduction == "mean" else loss.sum()), w.sum()

    return reference


def make(reduction: str):  # type: ignore[no-untyped-def]
    return lambda x, t, w: ge.NLLLoss(x, t, w, reduction=reduction, ignore_index=IGNORED)


CASES = [
    *(
        Case("NLLLoss", make(how), (LOGS, TARGET, WEIGHT), nll(how), roundings=8, halves=False, note=how)
        for how in ("mean", "sum", "none")
    ),
    Case("MseLoss", ge.MseLoss, (LOGS, LOGS + 0.5), lambda a, b: np.mean((a - b) ** 2), roundings=8),
    Case(
        "MseLoss", lambda a, b: ge.MseLoss(a, b, reduction="none"), (LOGS, LOGS + 0.5), lambda a, b: (a - b) ** 2,
        roundings=4, note="none",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)
