from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.proto import UnsupportedGraphError
from tests.unit.emulator.ge.building import compute, ge
from tests.unit.emulator.ge.operators.cases import Array, Case, floats


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
    conv(
        "Conv3D",
        lambda x, w: ge.Conv3D(x, w, None, None, strides=[1] * 5, pads=[0, 0, 1, 1, 2, 2], groups=2,
                               dilations=[1, 1, 1, 1, 2], data_format="NCDHW"),
        (VOLUME, FILTER3[:2, :1].contiguous()), F.conv3d, padding=(0, 1, 2), dilation=(1, 1, 2), groups=2,
        note="groups",
    ),
    conv(
        "Conv2DTranspose",
        lambda x, w, b: ge.Conv2DTranspose([2, 6, 9, 13], x, w, b, None, strides=[1, 1, 1, 2], pads=[1, 1, 0, 0],
                                           dilations=[1, 1, 2, 1], groups=2, output_padding=[0, 0, 0, 1],
                                           data_format="NCHW"),
        (IMAGE, BACK, CHANNELS), F.conv_transpose2d, note="groups", stride=(1, 2), padding=(1, 0), dilation=(2, 1),
        groups=2, output_padding=(0, 1),
    ),
    conv(
        "Conv3DTranspose",
        lambda x, w: ge.Conv3DTranspose([1, 6, 9, 4, 6], x, w, None, None, strides=[1, 1, 2, 1, 1],
                                        pads=[0, 0, 1, 1, 0, 0], dilations=[1, 1, 1, 1, 2], groups=2,
                                        output_padding=[0, 0, 1, 0, 0], data_format="NCDHW"),
        (VOLUME, BACK3), F.conv_transpose3d, note="groups", stride=(2, 1, 1), padding=(0, 1, 0), dilation=(1, 1, 2),
        groups=2, output_padding=(1, 0, 0),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_its_reference(case: Case) -> None:
    for dtype in case.dtypes():
        case.check(dtype)


@pytest.mark.parametrize("pads", [[1, 0, 0, 0], [1, 0, 0, 1]], ids=str)
def test_uneven_padding_is_refused(pads: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"Conv2D.*pads"):
        compute(
            lambda x, w: ge.Conv2D(x, w, None, None, strides=[1] * 4, pads=pads, data_format="NCHW"),
            IMAGE, FILTER,
        )  # fmt: skip


def test_another_layout_is_refused_when_the_graph_is_planned() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"Conv2D.*data_format='NHWC'"):
        compute(lambda x, w: ge.Conv2D(x, w, None, None, strides=[1] * 4, pads=[0] * 4), IMAGE, FILTER)
