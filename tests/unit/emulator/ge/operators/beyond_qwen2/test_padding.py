from __future__ import annotations

import numpy as np
import pytest

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Case, floats

X = floats(1, 3, 4)
PADS = [0, 0, 1, 2, 2, 3]
PAIRS = [(0, 0), (1, 2), (2, 3)]

CASES = [
    Case("PadV3", lambda x: ge.PadV3(x, PADS, 1.5), (X,), lambda x: np.pad(x, PAIRS, constant_values=1.5)),
    Case("PadV3", lambda x: ge.PadV3(x, PADS, None), (X,), lambda x: np.pad(x, PAIRS), note="zero"),
    Case("PadV3", lambda x: ge.PadV3(x, [0, 0, -1, 0, 0, -2], None), (X,), lambda x: x[:, 1:, :-2], note="negative"),
    Case(
        "PadV3", lambda x: ge.PadV3(x, PADS, None, mode="edge"), (X,), lambda x: np.pad(x, PAIRS, "edge"),
        note="edge",
    ),
    Case(
        "PadV3", lambda x: ge.PadV3(x, PADS, None, mode="reflect"), (X,), lambda x: np.pad(x, PAIRS, "reflect"),
        note="reflect",
    ),
    Case(
        "MirrorPad", lambda x: ge.MirrorPad(x, PADS, mode="REFLECT"), (X,), lambda x: np.pad(x, PAIRS, "reflect"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"MirrorPad.*SYMMETRIC"):
        compute(lambda x: ge.MirrorPad(x, PADS, mode="SYMMETRIC"), X)
