from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats, integers

X = floats(4, 5, 3)
INDEX = torch.tensor([[2, 0], [1, 3]])
ELEMENTS = integers(4, 2, 3, high=5)
UNIQUE = torch.tensor([[4, 0, 2], [1, 3, 0]])
CACHE, STARTS, STEP = floats(2, 6, 3), torch.tensor([1, 4]), floats(2, 2, 3, seed=1)


def scattered(cache: Array, starts: Array, updates: Array) -> Array:
    out = cache.copy()
    for row, start in enumerate(starts):
        out[row, start : start + updates.shape[1]] = updates[row]
    return out


def scatter_elements(add: bool):  # type: ignore[no-untyped-def]
    def reference(data: Array, index: Array, updates: Array) -> Array:
        out = data.copy()
        for at in np.ndindex(index.shape):
            target = (at[0], index[at])
            out[target] = out[target] + updates[at] if add else updates[at]
        return out

    return reference


def put_rows(data: Array, index: Array, updates: Array) -> Array:
    out = data.copy()
    for at, row in zip(index, updates, strict=True):
        out[tuple(at)] = row
    return out


def add_rows(data: Array, index: Array, updates: Array) -> Array:
    out = data.copy()
    for at, row in zip(index, updates, strict=True):
        out[:, at] += 0.5 * row
    return out


def view_copied(dst: Array, src: Array) -> Array:
    out = dst.copy().reshape(-1)
    for i, j in np.ndindex(2, 3):
        out[1 + 7 * i + 2 * j] = src.reshape(-1)[i + 2 * j]
    return out.reshape(dst.shape)


ROWS = floats(4, 5)

CASES = [
    Case("TensorMove", ge.TensorMove, (X,), lambda x: x),
    Case("Assign", lambda x, y: ge.Assign(ge.TensorMove(x), y), (X, X + 1), lambda x, y: y),
    Case(
        "Scatter", lambda c, i, u: ge.Scatter(ge.TensorMove(c), i, u, reduce="update", axis=1), (CACHE, STARTS, STEP),
        scattered,
    ),
    Case(
        "ScatterNdUpdate", lambda x, i, u: ge.ScatterNdUpdate(ge.TensorMove(x), i, u),
        (X, torch.tensor([[0, 1], [3, 4]]), floats(2, 3, seed=1)), put_rows,
    ),
    Case(
        "ScatterNdUpdate", lambda x, i, u: ge.ScatterNdUpdate(ge.TensorMove(x), i, u),
        (X, torch.tensor([[3], [1]]), floats(2, 5, 3, seed=1)), put_rows, note="matrices",
    ),
    Case(
        "ScatterNdUpdate", lambda x, i, u: ge.ScatterNdUpdate(ge.TensorMove(x), i, u),
        (X, torch.tensor([[3, 0, 2], [1, 4, 0]]), floats(2, seed=1)), put_rows, note="numbers",
    ),
    Case(
        "ViewCopy",
        lambda x, y: ge.ViewCopy(ge.TensorMove(x), [2, 3], [7, 2], [1], y, [2, 3], [1, 2], [0]),
        (ROWS, floats(2, 3, seed=1)), view_copied,
    ),
    Case(
        "InplaceIndexAdd", lambda x, i, u, a: ge.InplaceIndexAdd(ge.TensorMove(x), i, u, a, axis=1),
        (ROWS.T.contiguous(), torch.tensor([0, 2], dtype=torch.int32), floats(5, 2, seed=1), torch.tensor(0.5)),
        lambda x, i, u, a: add_rows(x, i, u.T), size=lambda x, i, u, a: np.abs(x) + 3,
    ),
    Case("GatherV2", lambda x, i: ge.GatherV2(x, i, 1), (X, INDEX), lambda x, i: x[:, i]),
    Case(
        "GatherV2", lambda x, i: ge.GatherV2(x, i, -1, negative_index_support=True), (X, torch.tensor([-1, 0])),
        lambda x, i: x[..., [2, 0]], note="negative",
    ),
    Case("Gather", ge.Gather, (X, INDEX), lambda x, i: x[i]),
    Case(
        "GatherElements", lambda x, i: ge.GatherElements(x, i, dim=1), (X, ELEMENTS),
        lambda x, i: np.take_along_axis(x, i, 1),
    ),
    Case(
        "ScatterElements", lambda x, i, u: ge.ScatterElements(x, i, u, axis=1), (ROWS, UNIQUE, floats(2, 3, seed=1)),
        scatter_elements(add=False),
    ),
    Case(
        "ScatterElements", lambda x, i, u: ge.ScatterElements(x, i, u, axis=1, reduction="add"),
        (ROWS, torch.zeros(4, 3, dtype=torch.int64), floats(4, 3, seed=1)), scatter_elements(add=True),
        size=lambda x, i, u: 4.0, roundings=4, note="add",
    ),
    Case(
        "ScatterElements", lambda x, i, u: ge.ScatterElements(x, i, u, axis=1),
        (ROWS, torch.tensor([[-1]]), torch.ones(1, 1)), scatter_elements(add=False), note="negative",
    ),
    Case(
        "IndexByTensor", lambda x, i, j: ge.IndexByTensor(x, [i, j], indices_mask=[1, 0, 1]),
        (X, torch.tensor([0, 3]), torch.tensor([2, 1])), lambda x, i, j: x[i, :, j],
    ),
    Case(
        "Gather", lambda x, i: ge.Gather(x, i, negative_index_support=True), (X, torch.tensor([-1, 0])),
        lambda x, i: x[[3, 0]], note="negative",
    ),
    Case(
        "InplaceIndexAdd", lambda x, i, u: ge.InplaceIndexAdd(ge.TensorMove(x), i, u, None, axis=0),
        (ROWS, torch.tensor([3, 1], dtype=torch.int32), floats(2, 5, seed=1)),
        lambda x, i, u: x + np.stack([0 * u[0], u[1], 0 * u[0], u[0]]), size=lambda x, i, u: np.abs(x) + 3,
        note="rows",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_scatter_beyond_the_end_is_an_error_and_not_a_write() -> None:
    with pytest.raises(RuntimeError, match=r"GE operator Scatter \(Scatter\) failed"):
        compute(lambda c, i, u: ge.Scatter(c, i, u, reduce="update", axis=1), CACHE.clone(), torch.tensor([1, 5]), STEP)


def test_a_negative_index_needs_its_flag() -> None:
    with pytest.raises(RuntimeError, match="GatherV2"):
        compute(lambda x, i: ge.GatherV2(x, i, 0), X, torch.tensor([-1]))
