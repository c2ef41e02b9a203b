from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

X = floats(2, 3, 6, 8)


def windows(x: Array, height: int, width: int, pad: int = 0, fill: float = 0.0) -> Array:
    """Side-by-side windows (…, H/height, W/width, height·width)."""
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)], constant_values=fill)
    rows, columns = x.shape[2] // height, x.shape[3] // width
    cut = x[:, :, : rows * height, : columns * width].reshape(*x.shape[:2], rows, height, columns, width)
    return cut.transpose(0, 1, 2, 4, 3, 5).reshape(*x.shape[:2], rows, columns, -1)


def max_pool(x: Array) -> tuple[Array, Array]:
    cut = windows(x, 2, 4)
    inside = cut.argmax(-1)
    row, column = np.indices(inside.shape)[2:]
    flat = (row * 2 + inside // 4) * x.shape[3] + column * 4 + inside % 4
    return cut.max(-1), flat.astype(np.int32)


def max_pool_by_pytorch(x: Array) -> tuple[Array, Array]:
    values, index = F.max_pool2d(torch.from_numpy(x), 3, (2, 3), 1, (1, 2), True, return_indices=True)
    return values.numpy(), index.int().numpy()


def average_with_padding(x: Array) -> Array:
    counted = windows(np.ones_like(x), 2, 2, pad=1).sum(-1)
    return windows(x, 2, 2, pad=1).sum(-1) / counted


def grid_sample(mode: str, padding: str, aligned: bool):  # type: ignore[no-untyped-def]
    def reference(x: Array, grid: Array) -> Array:
        return F.grid_sample(torch.from_numpy(x), torch.from_numpy(grid), mode, padding, aligned).numpy()

    return reference


def bilinear_at(x: Array, grid: Array) -> Array:
    """grid_sample with corners aligned and all points inside, from its definition."""
    out = np.zeros((*x.shape[:2], *grid.shape[1:3]))
    height, width = x.shape[2:]
    for n, i, j in np.ndindex(grid.shape[:3]):
        column, row = (grid[n, i, j] + 1) / 2 * np.array([width - 1, height - 1])
        left, top = int(column), int(row)
        for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            weight = (1 - abs(row - r)) * (1 - abs(column - c))
            if weight > 0:
                out[n, :, i, j] += weight * x[n, :, r, c]
    return out


GRID = floats(2, 3, 2, 2, seed=1, low=-0.9, high=0.9)
VOLUME, GRID3 = floats(1, 2, 3, 4, 5), floats(1, 2, 2, 2, 3, seed=1, low=-0.9, high=0.9)

CASES = [
    Case(
        "AvgPoolV2", lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 2, 4], strides=[1, 1, 2, 4]), (X,),
        lambda x: windows(x, 2, 4).mean(-1), size=lambda x: 3.0,
    ),
    Case(
        "AvgPoolV2", lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 2, 2], strides=[1, 1, 2, 2], pads=[1, 1, 1, 1]), (X,),
        average_with_padding, size=lambda x: 3.0, note="padding not counted",
    ),
    Case(
        "AvgPoolV2",
        lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 2, 2], strides=[1, 1, 2, 2], pads=[1, 1, 1, 1], exclusive=False), (X,),
        lambda x: windows(x, 2, 2, pad=1).mean(-1), size=lambda x: 3.0, note="padding counted",
    ),
    Case(
        "AvgPoolV2",
        lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 2, 2], strides=[1, 1, 2, 2], pads=[0, 0, 1, 1], exclusive=False), (X,),
        lambda x: windows(np.pad(x, [(0, 0)] * 3 + [(1, 1)]), 2, 2).mean(-1), size=lambda x: 3.0,
        note="padding in width",
    ),
    Case(
        "MaxPoolWithArgmaxV1",
        lambda x: ge.MaxPoolWithArgmaxV1(x, ksize=[1, 2, 4, 1], strides=[1, 2, 4, 1], pads=[1, 0, 0, 1]), (X,),
        max_pool,
    ),
    Case(
        "AdaptiveAvgPool2d", lambda x: ge.AdaptiveAvgPool2d(x, output_size=[3, 2]), (X,),
        lambda x: windows(x, 2, 4).mean(-1), size=lambda x: 3.0,
    ),
    Case(
        "ResizeNearestNeighborV2", lambda x: ge.ResizeNearestNeighborV2(x, [9, 4]), (X,),
        lambda x: x[:, :, np.arange(9) * 6 // 9][..., np.arange(4) * 8 // 4],
    ),
    Case(
        "GridSampler2D", lambda x, g: ge.GridSampler2D(x, g, align_corners=True), (X, GRID), bilinear_at,
        size=lambda x, g: 20.0, roundings=8, halves=False,
    ),
    Case(
        "GridSampler2D",
        lambda x, g: ge.GridSampler2D(x, g, interpolation_mode="nearest", padding_mode="border"), (X, GRID * 2),
        grid_sample("nearest", "border", False), halves=False, note="nearest",
    ),
    Case(
        "GridSampler3D", ge.GridSampler3D, (VOLUME, GRID3), grid_sample("bilinear", "zeros", False),
        size=lambda x, g: 20.0, roundings=8, halves=False,
    ),
    Case(
        "AvgPoolV2",
        lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 4, 3], strides=[1, 1, 4, 3], ceil_mode=True, divisor_override=5), (X,),
        lambda x: windows(np.pad(x, [(0, 0), (0, 0), (0, 2), (0, 1)]), 4, 3).sum(-1) / 5, size=lambda x: 9.0,
        note="rounded up",
    ),
    Case(
        "MaxPoolWithArgmaxV1",
        lambda x: ge.MaxPoolWithArgmaxV1(x, ksize=[1, 3, 3, 1], strides=[1, 2, 3, 1], pads=[1, 1, 1, 1],
                                         dilation=[1, 1, 2, 1], ceil_mode=True), (X,),
        max_pool_by_pytorch, note="rounded up",
    ),
    Case(
        "AdaptiveAvgPool2d", lambda x: ge.AdaptiveAvgPool2d(x, output_size=[2, 4]), (X,),
        lambda x: windows(x, 3, 2).mean(-1), size=lambda x: 3.0, note="other sizes",
    ),
    Case(
        "GridSampler3D",
        lambda x, g: ge.GridSampler3D(x, g, interpolation_mode="nearest", padding_mode="border", align_corners=True),
        (VOLUME, GRID3 * 2), grid_sample("nearest", "border", True), halves=False, note="nearest",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


@pytest.mark.parametrize("pads", [[1, 0, 0, 0], [1, 0, 0, 1]], ids=str)
def test_uneven_padding_is_refused(pads: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"AvgPoolV2.*pads=.* differ between the sides"):
        compute(lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 2, 2], strides=[1, 1, 2, 2], pads=pads), X)


def test_average_of_part_of_a_window_may_have_its_own_divisor() -> None:
    (got,) = compute(
        lambda x: ge.AvgPoolV2(x, ksize=[1, 1, 2, 2], strides=[1, 1, 2, 2], divisor_override=8), torch.ones(1, 1, 2, 2)
    )
    assert got.item() == 0.5
