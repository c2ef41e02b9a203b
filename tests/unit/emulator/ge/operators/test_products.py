from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.proto import UnsupportedGraphError
from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats

A, B, BIAS = floats(3, 6), floats(6, 5, seed=1), floats(5, seed=2)
BATCH_A, BATCH_B = floats(2, 3, 6), floats(2, 6, 5, seed=1)


def magnitude(*operands: Array) -> Array:
    a, b, *bias = operands
    return np.abs(a) @ np.abs(b) + sum(np.abs(x) for x in bias)


def swapped(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def convolution(function: Any, **options: Any) -> tuple[Any, Any]:
    """Reference and magnitude of a convolution, by PyTorch in float64."""

    def reference(*operands: Array) -> Array:
        return function(*(torch.from_numpy(x) for x in operands), **options).numpy()

    return reference, lambda *operands: reference(*(np.abs(x) for x in operands))


def conv(name: str, make: Any, inputs: tuple[torch.Tensor, ...], function: Any, note: str = "", **options: Any) -> Case:
    reference, size = convolution(function, **options)
    terms = inputs[1].numel() // inputs[1].shape[0]
    return Case(name, make, inputs, reference, size=size, roundings=terms, halves=False, note=note)


IMAGE, FILTER, CHANNELS = floats(2, 4, 7, 6), floats(6, 4, 3, 2, seed=1), floats(6, seed=2)
VOLUME, FILTER3 = floats(1, 2, 4, 5, 4), floats(3, 2, 2, 3, 2, seed=1)
BACK, BACK3 = floats(4, 3, 3, 2, seed=3), floats(2, 3, 2, 2, 2, seed=3)

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
    conv(
        "Conv2D",
        lambda x, w, b: ge.Conv2D(x, w, b, None, strides=[1, 1, 2, 1], pads=[1, 1, 0, 0], dilations=[1, 1, 1, 2],
                                  data_format="NCHW"),
        (IMAGE, FILTER, CHANNELS), F.conv2d, stride=(2, 1), padding=(1, 0), dilation=(1, 2),
    ),
    conv(
        "Conv2D",
        lambda x, w: ge.Conv2D(x, w, None, None, strides=[1] * 4, pads=[0] * 4, groups=2, data_format="NCHW"),
        (IMAGE, FILTER[:, :2].contiguous()), F.conv2d, groups=2, note="groups",
    ),
    conv(
        "Conv3D",
        lambda x, w: ge.Conv3D(x, w, None, None, strides=[1, 1, 1, 2, 1], pads=[1, 1, 0, 0, 0, 0], data_format="NCDHW"),
        (VOLUME, FILTER3), F.conv3d, stride=(1, 2, 1), padding=(1, 0, 0),
    ),
    conv(
        "Conv2DTranspose",
        lambda x, w: ge.Conv2DTranspose([2, 3, 15, 7], x, w, None, None, strides=[1, 1, 2, 1], pads=[0] * 4,
                                        data_format="NCHW"),
        (IMAGE, BACK), F.conv_transpose2d, stride=(2, 1),
    ),
    conv(
        "Conv3DTranspose",
        lambda x, w: ge.Conv3DTranspose([1, 3, 5, 6, 5], x, w, None, None, strides=[1] * 5, pads=[0] * 6,
                                        data_format="NCDHW"),
        (VOLUME, BACK3), F.conv_transpose3d,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


def test_a_product_of_the_wrong_side_is_seen() -> None:
    wrong = Case("MatMul", lambda a, b: ge.MatMul(b, a, None), (A, B[:, :3].contiguous()), np.matmul)
    with pytest.raises(AssertionError, match="shape"):
        wrong.check(torch.float32)


def test_uneven_padding_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Conv2D.*pads"):
        compute(
            lambda x, w: ge.Conv2D(x, w, None, None, strides=[1] * 4, pads=[1, 0, 0, 0], data_format="NCHW"),
            IMAGE, FILTER,
        )  # fmt: skip


def test_another_layout_is_refused_when_the_graph_is_planned() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"Conv2D.*data_format='NHWC'"):
        compute(lambda x, w: ge.Conv2D(x, w, None, None, strides=[1] * 4, pads=[0] * 4), IMAGE, FILTER)
