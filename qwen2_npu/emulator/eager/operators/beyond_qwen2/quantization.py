"""Int8 quantisation of activations and weights. Rounding is to nearest, ties to even."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor

RANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int32: (-(1 << 31), (1 << 31) - 1)}

SCALAR_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.int8,
    13: torch.uint8,
    14: torch.int32,
    15: torch.bfloat16,
}
"""Number of a dtype in a schema -> what is stored; 12 to 14 are PyTorch's quantised types."""


def _dtype(operator: str, name: str, number: int | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if number is None:
        return default
    found = number if isinstance(number, torch.dtype) else SCALAR_TYPES.get(number)
    if found is None:
        raise NotImplementedError(f"{operator}: {name}={number} is not emulated; only int8 is")
    return found


def _refuse(operator: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise NotImplementedError(f"{operator}: {', '.join(given)} is not emulated")


def _clamp(x: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = RANGE[dtype]
    return x.double().round().clamp(low, high).to(dtype)


def quantize(
    x: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """round(x / scales) + zero_points, or x · scales + zero_points without ``div_mode``; one scale per ``axis``."""
    target = _dtype("npu_quantize", "dtype", dtype, torch.int8)
    scales = _along(scales, x.dim(), axis)
    y = x.float() / scales.float() if div_mode else x.float() * scales.float()
    return _clamp(y if zero_points is None else y + _along(zero_points, x.dim(), axis).float(), target)


def _along(value: Tensor, dims: int, axis: int) -> Tensor:
    """A vector of one value per position of ``axis``, broadcastable to ``dims`` dimensions; others stay."""
    if value.dim() > 1 or value.numel() == 1:
        return value
    shape = [1] * dims
    shape[axis] = -1
    return value.view(shape)


def dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(int8 rows, their scale max|row| / 127)"""
    _refuse("npu_dynamic_quant", group_index=group_index, dst_type_max=dst_type_max or None)
    target = _dtype("npu_dynamic_quant", "dst_type", dst_type, torch.int8)
    if quant_mode != "pertoken" or target is not torch.int8:
        raise NotImplementedError(f"npu_dynamic_quant: quant_mode={quant_mode!r}, {target} is not emulated")
    wide = x.float() if smooth_scales is None else x.float() * smooth_scales.float()
    scale = wide.abs().amax(-1) / 127
    return _clamp(wide / torch.where(scale == 0, 1, scale).unsqueeze(-1), torch.int8), scale


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **others: Any,
) -> Tensor:
    """(x1 @ x2 + bias) · scale · pertoken_scale of int8 matrices; + offset for an int8 result."""
    _refuse("npu_quant_matmul", **others)
    if x1.dtype is not torch.int8 or scale.dtype is torch.int64:
        raise NotImplementedError(f"npu_quant_matmul: {x1.dtype} with scales in {scale.dtype} is not emulated")
    target = _dtype("npu_quant_matmul", "output_dtype", output_dtype, torch.int8)
    product = torch.matmul(x1.double(), x2.double())  # exact: sums of int8 products stay far below 2**53
    if bias is not None and not bias.is_floating_point():
        product = product + bias.double()
    if target is torch.int32:
        return product.to(torch.int32)
    y = product.float() * scale.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale.float().unsqueeze(-1)
    if bias is not None and bias.is_floating_point():
        y = y + bias.float()
    if offset is not None:
        y = y + offset.float()
    return _clamp(y, torch.int8) if target is torch.int8 else y.to(target)


def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x @ ((weight + antiquant_offset) · antiquant_scale) + bias

    Args:
        x: (M, K). weight: int8 (K, N).
        antiquant_scale: one for all, (N,), or one row per group of ``antiquant_group_size`` along K.
    """
    _refuse(
        "npu_weight_quant_batchmatmul", quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype
    )
    if weight.dtype is not torch.int8 or antiquant_scale.dtype is torch.int64:
        raise NotImplementedError(f"npu_weight_quant_batchmatmul: {weight.dtype} weights are not emulated; int8 is")

    def rows(value: Tensor) -> Tensor:
        if antiquant_group_size:
            return value.repeat_interleave(antiquant_group_size, 0)[: weight.shape[0]].float()
        return value.float()

    wide = weight.float() if antiquant_offset is None else weight.float() + rows(antiquant_offset)
    # The weight is dequantised to the activations' dtype before the product.
    y = x.float() @ (wide * rows(antiquant_scale)).to(x.dtype).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def anti_quant(
    x: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> Tensor:
    """(x + offset) · scale of int8 values."""
    if x.dtype is not torch.int8:
        raise NotImplementedError(f"npu_anti_quant: {x.dtype} is not emulated; only int8 is")
    wide = x.float() if offset is None else x.float() + offset.float()
    return (wide * scale.float()).to(_dtype("npu_anti_quant", "dst_dtype", dst_dtype, torch.float16))


TABLE: dict[str, Callable[..., Any]] = {
    "npu_quantize": quantize,
    "npu_dynamic_quant": dynamic_quant,
    "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_anti_quant": anti_quant,
}
