from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Case, floats, integers

X = floats(3, 4, 5)
ROW = integers(6)

CASES = [
    Case("Identity", ge.Identity, (X,), lambda x: x),
    Case("Reshape", lambda x: ge.Reshape(x, [5, -1]), (X,), lambda x: x.reshape(5, 12)),
    Case("Transpose", lambda x: ge.Transpose(x, [2, 0, 1]), (X,), lambda x: x.transpose(2, 0, 1)),
    Case("Unsqueeze", lambda x: ge.Unsqueeze(x, axes=[1]), (X,), lambda x: x[:, None]),
    Case("Unsqueeze", lambda x: ge.Unsqueeze(x, axes=[-1, 0]), (X,), lambda x: x[None, ..., None], note="two"),
    Case("Squeeze", lambda x: ge.Squeeze(x, axis=[1]), (X[:, :1],), lambda x: x[:, 0]),
    Case("Squeeze", ge.Squeeze, (X[:1, :1],), lambda x: x[0, 0], note="all"),
    Case("ExpandDims", lambda x: ge.ExpandDims(x, -2), (X,), lambda x: x[:, :, None]),
    Case("BroadcastTo", lambda x: ge.BroadcastTo(x, [2, 3, 4, 5]), (X[:, :1],), lambda x: np.tile(x, (2, 1, 4, 1))),
    Case("Expand", lambda x: ge.Expand(x, [2, -1, 5]), (X[0, :, :1],), lambda x: np.tile(x, (2, 1, 5))),
    Case("SplitV", lambda x: ge.SplitV(x, [1, 3], 1, num_split=2), (X,), lambda x: (x[:, :1], x[:, 1:])),
    Case(
        "SplitV", lambda x: ge.SplitV(x, [2, -1], 2, num_split=2), (X,), lambda x: (x[..., :2], x[..., 2:]),
        note="rest",
    ),
    Case("Split", lambda x: ge.Split(1, x, num_split=2), (X,), lambda x: (x[:, :2], x[:, 2:])),
    Case("SplitD", lambda x: ge.SplitD(x, split_dim=0, num_split=3), (X,), lambda x: (x[:1], x[1:2], x[2:])),
    Case("Unpack", lambda x: ge.Unpack(x, num=3, axis=0), (X,), lambda x: (x[0], x[1], x[2])),
    Case(
        "StridedSliceV2", lambda x: ge.StridedSliceV2(x, [1, 0], [3, 5], [1, 2], [1, 2]), (X,),
        lambda x: x[:, 1:3, 0:5:2],
    ),
    Case(
        "StridedSliceV2", lambda x: ge.StridedSliceV2(x, [0, -2], [2, 9], None, None), (X,), lambda x: x[:2, -2:],
        note="first dimensions",
    ),
    Case(
        "StridedSliceV2", lambda x: ge.StridedSliceV2(x, [0, 1], [-1, -2], [0, 2], [1, 1]), (X,),
        lambda x: x[:-1, :, 1:-2], note="ends from the end",
    ),
    Case("Slice", lambda x: ge.Slice(x, [1, 0, 2], [2, -1, 2]), (X,), lambda x: x[1:3, :, 2:4]),
    Case(
        "AsStrided", lambda x: ge.AsStrided(x, [2, 3], [7, 2], [4]), (X,),
        lambda x: np.lib.stride_tricks.as_strided(x.reshape(-1)[4:], (2, 3), (56, 16)).copy(),
    ),
    Case("ConcatV2", lambda a, b: ge.ConcatV2([a, b], 1, N=2), (X, X[:, :2]), lambda a, b: np.concatenate((a, b), 1)),
    Case(
        "ConcatV2", lambda a, b: ge.ConcatV2([a, b], 0, N=2), (ROW[0], ROW[1]), lambda a, b: np.array([a, b]),
        note="scalars",
    ),
    Case(
        "ConcatD", lambda a, b: ge.ConcatD([a, b], concat_dim=0, N=2), (X, X[:1]),
        lambda a, b: np.concatenate((a, b)),
    ),
    Case("Pack", lambda a, b: ge.Pack([a, b], axis=1, N=2), (X, X + 1), lambda a, b: np.stack((a, b), 1)),
    Case("Tile", lambda x: ge.Tile(x, [2, 1, 3]), (X,), lambda x: np.tile(x, (2, 1, 3))),
    Case("ReverseV2", lambda x: ge.ReverseV2(x, [0, 2]), (X,), lambda x: x[::-1, :, ::-1]),
    Case("Tril", lambda x: ge.Tril(x, diagonal=1), (X,), lambda x: np.tril(x, 1)),
    Case("Triu", lambda x: ge.Triu(x, diagonal=-1), (X,), lambda x: np.triu(x, -1)),
    Case("Shape", ge.Shape, (X,), lambda x: np.array(x.shape, np.int32)),
    Case("Shape", lambda x: ge.Shape(x, dtype=9), (X,), lambda x: np.array(x.shape), note="int64"),
    Case(
        "Bitcast", lambda x: ge.Bitcast(x, type=3), (X,), lambda x: x.astype(np.float32).view(np.int32), halves=False,
    ),
    Case(
        "SplitV", lambda x: ge.SplitV(x, [1, 1, 2], 1, num_split=3), (X,), lambda x: (x[:, :1], x[:, 1:2], x[:, 2:]),
        note="three",
    ),
    Case("Split", lambda x: ge.Split(0, x, num_split=3), (X,), lambda x: (x[:1], x[1:2], x[2:]), note="three"),
    Case("SplitD", lambda x: ge.SplitD(x, split_dim=1, num_split=2), (X,), lambda x: (x[:, :2], x[:, 2:]), note="two"),
    Case(
        "Unpack", lambda x: ge.Unpack(x, num=4, axis=1), (X,), lambda x: tuple(x[:, i] for i in range(4)),
        note="middle",
    ),
    Case(
        "ConcatD", lambda a, b: ge.ConcatD([a, b], concat_dim=2, N=2), (X, X[..., :1]),
        lambda a, b: np.concatenate((a, b), 2), note="last",
    ),
    Case("ConcatD", lambda a: ge.ConcatD([a], concat_dim=0, N=1), (X,), lambda a: a, note="one"),
    Case("Pack", lambda a: ge.Pack([a, a, a], axis=0, N=3), (X,), lambda a: np.stack((a, a, a)), note="three"),
    Case(
        "Bitcast", lambda x: ge.Bitcast(x, type=0), (integers(3, 4, dtype=torch.int32),),
        lambda x: x.view(np.float32).astype(np.float64), note="float",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_shapes_may_be_computed() -> None:
    (got,) = compute(lambda x, rows: ge.Reshape(x, ge.Pack([rows, -1], N=2, axis=0)), X, torch.tensor(4))
    assert got.shape == (4, 15)


def test_strided_views_count_elements_of_the_value_not_of_its_memory() -> None:
    # x.T is a view in the engine and a dense tensor in GE.
    (got,) = compute(lambda x: ge.AsStrided(ge.Transpose(x, [1, 0]), [3], [1], [0]), torch.arange(6.0).reshape(2, 3))
    assert got.tolist() == [0, 3, 1]
