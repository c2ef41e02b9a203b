"""GE operators of images: pooling, resizing, sampling. Layouts are channels first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.beyond_qwen2.convolutions import padding
from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator


@operator("AvgPoolV2", fixed={"padding_mode": "CALCULATED", "data_format": "NCHW", "global_pooling": False})
def avg_pool(
    x: Tensor,
    *,
    ksize: list[int],
    strides: list[int],
    pads: tuple[int, ...] = (0, 0, 0, 0),
    ceil_mode: bool = False,
    exclusive: bool = True,
    divisor_override: int = 0,
) -> Tensor:
    return F.avg_pool2d(x, ksize[2:], strides[2:], padding(pads), ceil_mode, not exclusive, divisor_override or None)


@operator("MaxPoolWithArgmaxV1", fixed={"dtype": 3})
def max_pool_with_argmax(
    x: Tensor,
    *,
    ksize: list[int],
    strides: list[int],
    pads: list[int],
    dilation: tuple[int, ...] = (1, 1, 1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    # The attributes are laid out channels last, (1, h, w, 1), whatever the layout of x. Hardware packs argmax into
    # masks of its own; torchair drops it.
    y, argmax = F.max_pool2d(
        x, ksize[1:3], strides[1:3], pads[1:3], list(dilation[1:3]), ceil_mode, return_indices=True
    )
    return y, argmax.to(torch.int32)


@operator("AdaptiveAvgPool2d")
def adaptive_avg_pool(x: Tensor, *, output_size: list[int]) -> Tensor:
    height, width = output_size
    return F.adaptive_avg_pool2d(x, (height, width))


@operator("ResizeNearestNeighborV2", fixed={"align_corners": False, "half_pixel_centers": False})
def resize_nearest(x: Tensor, size: Ints) -> Tensor:
    return F.interpolate(x, size=list(size), mode="nearest")


@operator("GridSampler2D")
def grid_sampler_2d(
    x: Tensor,
    grid: Tensor,
    *,
    interpolation_mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    return F.grid_sample(x, grid, interpolation_mode, padding_mode, align_corners)


@operator("GridSampler3D", fixed={"data_format": "NCDHW"})
def grid_sampler_3d(
    x: Tensor,
    grid: Tensor,
    *,
    interpolation_mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    return F.grid_sample(x, grid, interpolation_mode, padding_mode, align_corners)
