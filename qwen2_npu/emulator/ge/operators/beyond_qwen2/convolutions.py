"""GE operators that convolve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator


def _spatial(values: list[int]) -> list[int]:
    """Channels-first attributes begin with batch and channel."""
    return values[2:]


def padding(pads: Sequence[int]) -> list[int]:
    """One number per dimension; PyTorch pads both sides alike, and so does everything torchair lowers.

    Raises:
        ValueError: the sides differ.
    """
    before, after = list(pads[::2]), list(pads[1::2])
    if before != after:
        raise ValueError(f"pads={list(pads)} differ between the sides of a dimension, which is not emulated")
    return before


def _convolve(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: list[int] | tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    return torch.convolution(
        x, filter, bias, _spatial(strides), padding(pads), _spatial(list(dilations)), False, [0] * rank, groups
    )


@operator("Conv2D", fixed={"data_format": "NCHW", "offset_x": 0})
def conv2d(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: tuple[int, ...] = (1, 1, 1, 1),
    groups: int = 1,
) -> Tensor:
    return _convolve(x, filter, bias, strides=strides, pads=pads, dilations=dilations, groups=groups)


@operator("Conv3D", fixed={"data_format": "NCDHW", "offset_x": 0})
def conv3d(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: tuple[int, ...] = (1, 1, 1, 1, 1),
    groups: int = 1,
) -> Tensor:
    return _convolve(x, filter, bias, strides=strides, pads=pads, dilations=dilations, groups=groups)


def _convolve_transposed(
    input_size: Ints,
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: list[int] | tuple[int, ...],
    groups: int,
    output_padding: list[int] | tuple[int, ...],
) -> Tensor:
    out = torch.convolution(
        x, filter, bias, _spatial(strides), padding(pads), _spatial(list(dilations)), True,
        _spatial(list(output_padding)), groups,
    )  # fmt: skip
    if tuple(out.shape) != input_size:
        raise ValueError(f"the result has shape {tuple(out.shape)}, and the graph asks for {input_size}")
    return out


@operator("Conv2DTranspose", fixed={"data_format": "NCHW", "offset_x": 0})
def conv2d_transpose(
    input_size: Ints,
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: tuple[int, ...] = (1, 1, 1, 1),
    groups: int = 1,
    output_padding: tuple[int, ...] = (0, 0, 0, 0),
) -> Tensor:
    return _convolve_transposed(
        input_size, x, filter, bias, strides=strides, pads=pads, dilations=dilations, groups=groups,
        output_padding=output_padding,
    )  # fmt: skip


@operator("Conv3DTranspose", fixed={"data_format": "NCDHW", "offset_x": 0})
def conv3d_transpose(
    input_size: Ints,
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: tuple[int, ...] = (1, 1, 1, 1, 1),
    groups: int = 1,
    output_padding: tuple[int, ...] = (0, 0, 0, 0, 0),
) -> Tensor:
    return _convolve_transposed(
        input_size, x, filter, bias, strides=strides, pads=pads, dilations=dilations, groups=groups,
        output_padding=output_padding,
    )  # fmt: skip
