"""Int8 and int4 quantisation of activations and weights. Rounding is to nearest, ties to even.

What ``qwen2_npu.ops`` computes of an operator is computed there: here are the options that it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu import ops
from qwen2_npu.ops.quantization import INT8

Tensor = torch.Tensor

HALVES = (torch.float16, torch.bfloat16)
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


INT4 = 16
"""Number of torch.quint4x2: int4, of which eight are packed into an int32."""


def _smoothed(x: Tensor, scales: Tensor | None, group_index: Tensor | None) -> Tensor:
    """x · scales in fp32.

    Args:
        scales: (H,), or with ``group_index`` (groups, H): row i for rows of x from group_index[i − 1] to
            group_index[i]. Rows after the last group stay as they are.
    """
    wide = x.float()
    if scales is None:
        return wide
    if group_index is None:
        return wide * scales.float()
    rows = wide.reshape(-1, x.shape[-1])
    group = torch.searchsorted(group_index.long(), torch.arange(rows.shape[0]), right=True)
    rest = torch.ones(1, scales.shape[-1])
    return (rows * torch.cat((scales.float(), rest))[group]).view(x.shape)


def _bits(operator: str, x: Tensor, dst_type: int | torch.dtype | None) -> int:
    """8 or 4, from the number of a dtype."""
    if dst_type in (INT4, torch.quint4x2):
        if x.shape[-1] % 8:
            raise ValueError(f"{operator}: int4 needs a last dimension divisible by 8, not {x.shape[-1]}")
        return 4
    target = _dtype(operator, "dst_type", dst_type, torch.int8)
    if target is not torch.int8:
        raise NotImplementedError(f"{operator}: dst_type={dst_type} ({target}) is not emulated; int8 and int4 are")
    return 8


def _rounded(y: Tensor, bits: int) -> Tensor:
    """int8, or int4 packed into int32: the first of eight is in the lowest bits."""
    top = 1 << (bits - 1)
    whole = y.round().clamp(-top, top - 1)
    return whole.to(torch.int8) if bits == 8 else pack_int4(whole)


def pack_int4(values: Tensor) -> Tensor:
    """Eight int4 per int32 along the last dimension, the first in the lowest bits."""
    nibbles = values.to(torch.int64).view(*values.shape[:-1], -1, 8) & 15
    return (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def _prepared(
    operator: str,
    x: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    quant_mode: str,
    dst_type_max: float,
) -> Tensor:
    _refuse(operator, dst_type_max=dst_type_max or None)
    if quant_mode != "pertoken":
        raise NotImplementedError(f"{operator}: quant_mode={quant_mode!r} is not emulated; 'pertoken' is")
    if group_index is not None and smooth_scales is None:
        raise ValueError(f"{operator}: group_index needs smooth_scales")
    return _smoothed(x, smooth_scales, group_index)


def dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(int8 or packed int4 rows, their scale max|row| / 127 or / 7)"""
    if group_index is None and dst_type in INT8 and not dst_type_max and quant_mode == "pertoken":
        return ops.kernels["npu_dynamic_quant"](x, smooth_scales=smooth_scales)
    wide = _prepared("npu_dynamic_quant", x, smooth_scales, group_index, quant_mode, dst_type_max)
    bits = _bits("npu_dynamic_quant", x, dst_type)
    scale = wide.abs().amax(-1) / ((1 << (bits - 1)) - 1)
    return _rounded(wide / torch.where(scale == 0, 1, scale).unsqueeze(-1), bits), scale


def dynamic_quant_asymmetric(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale + offset in int8 or packed int4, scale (max − min) / 255 or / 15, offset). max becomes 127 or 7"""
    wide = _prepared("npu_dynamic_quant_asymmetric", x, smooth_scales, group_index, quant_mode, dst_type_max)
    bits = _bits("npu_dynamic_quant_asymmetric", x, dst_type)
    low, high = wide.aminmax(dim=-1)
    scale = (high - low) / ((1 << bits) - 1)
    divisor = torch.where(scale == 0, 1, scale)
    offset = ((1 << (bits - 1)) - 1) - high / divisor
    return _rounded(wide / divisor.unsqueeze(-1) + offset.unsqueeze(-1), bits), scale, offset


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
    wanted = _dtype("npu_quant_matmul", "output_dtype", output_dtype, torch.int8)
    if offset is None and wanted in (*HALVES, torch.int32) and x1.dtype is not torch.int32 and x2.dim() == 2:
        return ops.kernels["npu_quant_matmul"](
            x1, x2, scale, pertoken_scale=pertoken_scale, bias=bias, output_dtype=output_dtype, **others
        )
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
    one_scale = antiquant_scale.numel() == 1 and weight.shape[-1] != 1
    if antiquant_offset is None and not antiquant_group_size and not one_scale:
        others = {"quant_scale": quant_scale, "quant_offset": quant_offset, "weight_dtype": weight_dtype}
        return ops.kernels["npu_weight_quant_batchmatmul"](
            x, weight, antiquant_scale, bias=bias, inner_precise=inner_precise, **others
        )
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
    "npu_dynamic_quant_asymmetric": dynamic_quant_asymmetric,
    "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_anti_quant": anti_quant,
}
