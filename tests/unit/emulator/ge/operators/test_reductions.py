from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, booleans, floats, integers

X = floats(3, 4, 5)
COUNT = X.numel()
FLAGS = booleans(3, 4, 5)


def logsumexp(x: Array, axis: Any, keepdims: bool = False) -> Array:
    return np.log(np.exp(x).sum(axis, keepdims=keepdims))


def total(axis: Any, keepdims: bool = False) -> Any:
    return lambda x, *_: np.abs(x).sum(axis, keepdims=keepdims)


def along_last(x: Array, index: Array) -> Array:
    return np.take_along_axis(x, index, -1)


def norm(order: float) -> Any:
    def reference(x: Array) -> Array:
        if np.isinf(order):
            return np.abs(x).max(1) if order > 0 else np.abs(x).min(1)
        return (np.abs(x) ** order).sum(1) ** (1 / order)

    return reference


ROWS = [7, 0, 4, 9, 2, 8]
DISTINCT = torch.tensor([ROWS, ROWS[::-1]], dtype=torch.float32)
TIES = torch.tensor([[2.0, 1], [1, 1], [2, 0], [1, 0]]).repeat(10, 1)

CASES = [
    Case("ReduceSum", lambda x: ge.ReduceSum(x, [1]), (X,), lambda x: x.sum(1), size=total(1), roundings=4),
    Case(
        "ReduceSum", lambda x: ge.ReduceSum(x, [0, -1], keep_dims=True), (X,), lambda x: x.sum((0, 2), keepdims=True),
        size=total((0, 2), True), roundings=15, note="two kept",
    ),
    Case("ReduceSum", lambda x: ge.ReduceSum(x, [0, 1, 2]), (X,), np.sum, size=total(None), roundings=60, note="all"),
    Case(
        "ReduceSum", lambda x: ge.ReduceSum(x, [1]), (integers(3, 4, dtype=torch.int32),),
        lambda x: x.sum(1, dtype=np.int32), note="int32",
    ),
    Case("ReduceMean", lambda x: ge.ReduceMean(x, [1]), (X,), lambda x: x.mean(1), size=total(1), roundings=4),
    Case("ReduceMean", lambda x: ge.ReduceMean(x, []), (X,), np.mean, size=total(None), roundings=4, note="all"),
    Case("ReduceMax", lambda x: ge.ReduceMax(x, [0, 2]), (X,), lambda x: x.max((0, 2))),
    Case("ReduceMin", lambda x: ge.ReduceMin(x, [1], keep_dims=True), (X,), lambda x: x.min(1, keepdims=True)),
    Case("ReduceProd", lambda x: ge.ReduceProd(x, [0, 1]), (X,), lambda x: x.prod((0, 1)), roundings=14),
    Case(
        "ReduceProd", lambda x: ge.ReduceProd(x, [2, -2]), (X,), lambda x: x.prod((1, 2)), roundings=40,
        note="from both ends",
    ),
    Case("ReduceAll", lambda x: ge.ReduceAll(x, [2]), (FLAGS,), lambda x: x.all(2)),
    Case("ReduceAny", lambda x: ge.ReduceAny(x, [1, 2]), (FLAGS,), lambda x: x.any((1, 2))),
    Case(
        "ReduceLogSumExp", lambda x: ge.ReduceLogSumExp(x, [2]), (X,), lambda x: logsumexp(x, 2),
        size=lambda x: 1.0, roundings=4,
    ),
    Case(
        "ReduceStdWithMean",
        lambda x: ge.ReduceStdWithMean(x, ge.Expand(ge.ReduceMean(x, [1], keep_dims=True), ge.Shape(x)), dim=[1]),
        (X,), lambda x: x.std(1, ddof=1), roundings=8,
    ),
    *(
        Case("LpNormV2", lambda x, p=p: ge.LpNormV2(x, p=p, axes=[1], epsilon=0.0), (X,), norm(order),
             roundings=8, note=str(order), halves=order != 0.5)
        for p, order in ((2.0, 2.0), (0.5, 0.5), (2**31 - 1, np.inf), (-(2**31), -np.inf))
    ),
    Case("ArgMaxV2", lambda x: ge.ArgMaxV2(x, 1), (X,), lambda x: x.argmax(1)),
    Case("ArgMin", lambda x: ge.ArgMin(x, -1), (X,), lambda x: x.argmin(-1)),
    Case(
        "ArgMaxWithValue", lambda x: ge.ArgMaxWithValue(x, dimension=1), (X,),
        lambda x: (x.argmax(1).astype(np.int32), x.max(1)),
    ),
    Case(
        "ArgMinWithValue", lambda x: ge.ArgMinWithValue(x, dimension=2, keep_dims=True), (X,),
        lambda x: (x.argmin(2).astype(np.int32)[..., None], x.min(2, keepdims=True)),
    ),
    Case(
        "Sort", lambda x: ge.Sort(x, axis=-1), (DISTINCT,),
        lambda x: (np.sort(x, -1), np.argsort(x, -1).astype(np.int32)),
    ),
    Case(
        "Sort", lambda x: ge.Sort(x, axis=-1, descending=True), (DISTINCT,),
        lambda x: (-np.sort(-x, -1), np.argsort(-x, -1).astype(np.int32)), note="descending",
    ),
    Case(
        "TopKV2", lambda x: ge.TopKV2(x, 3), (DISTINCT,),
        lambda x: (-np.sort(-x, -1)[:, :3], np.argsort(-x, -1)[:, :3].astype(np.int32)),
    ),
    Case(
        "TopKV2", lambda x: ge.TopKV2(x, 2, largest=False, dim=1), (DISTINCT,),
        lambda x: (np.sort(x, 1)[:, :2], np.argsort(x, 1)[:, :2].astype(np.int32)), note="smallest",
    ),
    Case(
        "Cumsum", lambda x: ge.Cumsum(x, 1), (X,), lambda x: x.cumsum(1), size=lambda x: np.abs(x).cumsum(1),
        roundings=4,
    ),
    Case("Cumsum", lambda x: ge.Cumsum(x, -1), (integers(2, 6, dtype=torch.int32),),
         lambda x: x.cumsum(-1, dtype=np.int32), note="int32"),
    Case(
        "SearchSorted", lambda s, v: ge.SearchSorted(s, v, None),
        (torch.arange(5.0), torch.tensor([0.5, 2.0, 9.0])), lambda s, v: np.searchsorted(s, v),
    ),
    Case(
        "SearchSorted", lambda s, v: ge.SearchSorted(s, v, None, right=True, dtype=3),
        (torch.arange(5.0), torch.tensor([0.5, 2.0, 9.0])),
        lambda s, v: np.searchsorted(s, v, side="right").astype(np.int32), note="right",
    ),
    *(
        Case(name, lambda x, make=make: make(x, [1], keep_dims=True), (values,), reference, roundings=8, note="kept",
             size=lambda x: np.abs(x).sum(1, keepdims=True) + 1.0)
        for name, make, values, reference in (
            ("ReduceMean", ge.ReduceMean, X, lambda x: x.mean(1, keepdims=True)),
            ("ReduceMax", ge.ReduceMax, X, lambda x: x.max(1, keepdims=True)),
            ("ReduceProd", ge.ReduceProd, X, lambda x: x.prod(1, keepdims=True)),
            ("ReduceAll", ge.ReduceAll, FLAGS, lambda x: x.all(1, keepdims=True)),
            ("ReduceAny", ge.ReduceAny, FLAGS, lambda x: x.any(1, keepdims=True)),
            ("ReduceLogSumExp", ge.ReduceLogSumExp, X, lambda x: logsumexp(x, 1, keepdims=True)),
        )
    ),
    Case(
        "ReduceStdWithMean",
        lambda x: ge.ReduceStdWithMean(
            x, ge.Expand(ge.ReduceMean(x, [1], keep_dims=True), ge.Shape(x)), dim=[1], correction=0, keepdim=True
        ),
        (X,), lambda x: x.std(1, keepdims=True), roundings=8, note="kept",
    ),
    Case(
        "LpNormV2", lambda x: ge.LpNormV2(x, p=1.0, axes=[0, 2], keepdim=True, epsilon=0.0), (X,),
        lambda x: np.abs(x).sum((0, 2), keepdims=True), roundings=15, note="kept",
    ),
    Case("ArgMaxV2", lambda x: ge.ArgMaxV2(x, 1, dtype=3), (X,), lambda x: x.argmax(1).astype(np.int32), note="int32"),
    Case("ArgMin", lambda x: ge.ArgMin(x, 0, dtype=3), (X,), lambda x: x.argmin(0).astype(np.int32), note="int32"),
    Case(
        "ArgMaxWithValue", lambda x: ge.ArgMaxWithValue(x, dimension=0, keep_dims=True), (X,),
        lambda x: (x.argmax(0).astype(np.int32)[None], x.max(0, keepdims=True)), note="kept",
    ),
    Case(
        "ArgMinWithValue", lambda x: ge.ArgMinWithValue(x, dimension=0), (X,),
        lambda x: (x.argmin(0).astype(np.int32), x.min(0)), note="first",
    ),
    Case(
        "Sort", lambda x: ge.Sort(x, axis=0, stable=True), (TIES,),
        lambda x: (np.sort(x, 0), np.argsort(x, 0, kind="stable").astype(np.int32)), note="ties stay in order",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_the_first_of_equal_values_is_the_maximum() -> None:
    (index,) = compute(lambda x: ge.ArgMaxV2(x, 0), torch.tensor([1.0, 3.0, 3.0]))
    assert index.item() == 1
