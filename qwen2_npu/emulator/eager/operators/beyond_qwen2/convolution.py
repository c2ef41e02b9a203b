"""Convolutions in torch_npu's argument orders, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.eager.gradients import gradients

Tensor = torch.Tensor
Sizes = Sequence[int]


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """In as many dimensions as ``weight`` has after the first two."""
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * (weight.dim() - 2), groups)


def transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sizes,
    output_padding: Sizes,
    stride: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    return torch.convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def convolution_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients by x, weight, bias where ``mask`` asks."""
    none = [0] * (weight.dim() - 2)
    return _backward(grad, x, weight, stride, padding, dilation, False, none, groups, mask)


def transposed_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    padding: Sizes,
    output_padding: Sizes,
    stride: Sizes,
    dilation: Sizes,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return _backward(grad, x, weight, stride, padding, dilation, True, output_padding, groups, mask)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *geometry, mask = arguments
    out_channels = grad.shape[1]
    return torch.ops.aten.convolution_backward(grad, x, weight, [out_channels], *geometry, list(mask))


def dilated2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return convolution_backward(x, grad, weight, stride, padding, dilation, 1, mask)


def transpose2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    dilation: Sizes,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return transposed_backward(x, grad, weight, padding, output_padding, stride, dilation, 1, mask)


def depthwise2d(
    x: Tensor, weight: Tensor, kernel_size: Sizes, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """One group per input channel."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[-3])


def depthwise2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise2d(x, weight, kernel_size, None, stride, padding, dilation)

    return gradients(forward, (x, weight), grad, mask)


def _out(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def write(*args: Any, out: Tensor) -> Tensor:
        result = function(*args)
        return out.resize_(result.size()).copy_(result)

    return write


TABLE: dict[str, Callable[..., Any]] = {
    "npu_convolution": convolution,
    "npu_conv2d": convolution,
    "npu_conv2d.out": _out(convolution),
    "npu_conv3d": convolution,
    "npu_conv3d.out": _out(convolution),
    "npu_convolution_backward": convolution_backward,
    "npu_conv2d_backward": convolution_backward,
    "npu_conv3d_backward": convolution_backward,
    "npu_convolution_transpose": transposed,
    "npu_conv_transpose2d": transposed,
    "npu_convolution_transpose_backward": transposed_backward,
    "npu_conv_transpose2d_backward": transposed_backward,
    "npu_conv_transpose3d_backward": transposed_backward,
    "slow_conv_dilated2d_backward": dilated2d_backward,
    "slow_conv_transpose2d_backward": transpose2d_backward,
    "_conv_depthwise2d": depthwise2d,
    "_conv_depthwise2d.out": _out(depthwise2d),
    "_conv_depthwise2d_backward": depthwise2d_backward,
}
