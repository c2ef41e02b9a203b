"""Convolutions through torch_npu's own operators; the plain ones of torch.nn are in the database's sweep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.unit.emulator.eager.operators.harness import check, close, draw, on_npu, wide

npu = torch.ops.npu

GEOMETRY = [2, 1], [1, 2], [1, 2]
"""stride, padding, dilation"""


def test_convolution():
    stride, padding, dilation = GEOMETRY

    def formula(x, weight, bias, *_):
        return F.conv2d(x, weight, bias, stride, padding, dilation, 2)

    x, weight, bias = draw(2, 4, 7, 8), draw(6, 2, 3, 3), draw(6)
    check(npu.npu_convolution, formula, x, weight, bias, stride, padding, dilation, 2, differentiate=[0], meta=False)


def test_transposed():
    stride, padding, dilation = GEOMETRY

    def formula(x, weight, bias, *_):
        return F.conv_transpose2d(x, weight, bias, stride, padding, [1, 0], 2, dilation)

    x, weight, bias = draw(2, 4, 5, 6), draw(4, 3, 3, 3), draw(6)
    arguments = x, weight, bias, padding, [1, 0], stride, dilation, 2
    check(npu.npu_convolution_transpose, formula, *arguments, differentiate=[0], meta=False)


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False]])
def test_backward_computes_what_is_asked(mask):
    x, weight = draw(2, 4, 7, 8), draw(6, 4, 3, 3)
    y = F.conv2d(*wide((x, weight)), None, *GEOMETRY)
    leaves = wide((x, weight))
    y = F.conv2d(*leaves, None, *GEOMETRY)
    grad = draw(*y.shape, grad=False)
    expected = [*torch.autograd.grad(y, leaves, grad.double()), grad.double().sum((0, 2, 3))]
    arguments = on_npu((x.detach(), grad, weight.detach()))
    found = npu.npu_conv2d_backward(*arguments, *GEOMETRY, 1, mask)
    for one, other, wanted in zip(found, expected, mask, strict=True):
        if wanted:
            close(one, other, "npu_conv2d_backward")


def test_depthwise_with_several_filters_per_channel():
    def formula(x, weight, *_):
        return F.conv2d(x, weight, None, *GEOMETRY, groups=3)

    x, weight = draw(2, 3, 7, 8, grad=False), draw(6, 1, 3, 3, grad=False)
    check(torch.ops.aten._conv_depthwise2d, formula, x, weight, [3, 3], None, *GEOMETRY, meta=False)


@pytest.mark.parametrize("size", [(0,), (1, 2), (2, 6, 9, 9)], ids=["empty", "smaller", "larger"])
def test_a_given_result_takes_the_shape_of_the_convolution(size):
    x, weight, bias = (draw(*shape, grad=False) for shape in [(2, 4, 7, 8), (4, 1, 3, 3), (4,)])
    wanted = F.conv2d(x, weight, bias, [2, 1], [1, 2], 1, 4)
    plain = [npu.npu_conv2d.out, bias.npu(), [2, 1], [1, 2], [1, 1], 4]
    by_channel = [torch.ops.aten._conv_depthwise2d.out, [3, 3], bias.npu(), [2, 1], [1, 2], [1, 1]]
    for operator, *rest in (plain, by_channel):
        out = torch.empty(size, device="npu")
        assert operator(x.npu(), weight.npu(), *rest, out=out) is out
        torch.testing.assert_close(out.cpu(), wanted)
