"""Products of 8-bit weights, and the quantisation of activations to 8 bits, symmetric: no zero points.

Rounding to int8 is to nearest, ties to even. Between inputs and outputs all is float32, or exact integers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qwen2_npu.ops.checks import check_float, check_same_dtype, invalid, is_readable, reject_unsupported

MAX_SIZE = 65535
"""The largest K and N of a quantised product on Atlas A2: the head of a vocabulary of 152,064 is too wide."""
LARGEST = 127.0
PACKED_SIZES = 32
"""K and N that PyTorch's product of packed int8 is given are multiples of it."""
PACKED_ROWS = 16
"""Rows up to which that product is used."""
BLOCK_BYTES = 1 << 21
"""Of a weight in float32 that are made and multiplied at a time: they stay in the processor's cache (measured)."""
EXACT_SUMS = 1024
"""Products of two int8 whose sum float32 holds, in any order: 2^14 each."""

OUTPUT_DTYPES = {3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
"""Number of a dtype in a schema -> the dtype."""
BIASES = {
    torch.int32: (torch.int32,),
    torch.float16: (torch.int32, torch.float32),
    torch.bfloat16: (torch.int32, torch.float32, torch.bfloat16),
}
"""Dtype of a result -> those of a bias."""
INT8 = (None, 1, torch.int8)


def npu_weight_quant_batchmatmul(
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
    """``x @ (weight · antiquant_scale) + bias``. Inference only.

    Args:
        x: (M, K), float32, bfloat16 or float16.
        weight: int8 (K, N). Transposed, as ``(N, K).mT``, it is read fastest.
        antiquant_scale: (N,) or (1, N), of the dtype of ``x``: one per output.
        bias: (N,) or (1, N), float32 where ``x`` is bfloat16, else of its dtype.
        inner_precise: 0 or 1; changes no result here.

    Returns:
        (M, N) in the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or argument that is not supported, K or N above 65535.
    """
    op = "npu_weight_quant_batchmatmul"
    others = {"antiquant_offset": antiquant_offset, "quant_scale": quant_scale, "quant_offset": quant_offset}
    reject_unsupported(op, {**others, "antiquant_group_size": antiquant_group_size, "weight_dtype": weight_dtype})
    check_float(op, "x", x)
    if inner_precise not in (0, 1):
        raise invalid(op, "inner_precise", inner_precise, "0 or 1")
    if x.dim() != 2:
        raise invalid(op, "x", x, "(M, K)")
    columns = _check_weight(op, "weight", weight, "x", x)
    _check_vector(op, "antiquant_scale", antiquant_scale, columns, (x.dtype,))
    if bias is not None:
        _check_vector(op, "bias", bias, columns, (torch.float32 if x.dtype == torch.bfloat16 else x.dtype,))
    scale = antiquant_scale.reshape(columns)
    y = IN_GRAPHS(x, weight, scale, None if bias is None else bias.reshape(columns))
    return y


def dequantising_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight`` times one scale per column; from a transposed weight on a CPU it reads one byte per element."""
    if bias is None and _takes_packed(x, weight):  # it rounds to the dtype of x before a bias could be added
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.mT, scale)
    y = product_by_blocks(x.float(), weight) * scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def product_by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """float32 ``x`` (M, K) times an int8 ``weight`` (K, N), whose columns a CPU converts a few at a time.

    The whole weight in float32 would be written to memory and read from there, four bytes per element. Where ``x`` asks
    for a gradient it is made all the same.
    """
    if not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        return x @ weight.float()
    inner, outputs = weight.shape
    columns = max(1, BLOCK_BYTES // (4 * max(1, inner)))
    block = x.new_empty(min(columns, outputs), inner)  # one for all: fresh memory costs more than the product
    y = x.new_empty(x.shape[0], outputs)
    for part, product in zip(weight.mT.split(columns), y.split(columns, 1), strict=True):
        torch.mm(x, block[: part.shape[0]].copy_(part).mT, out=product)
    return y


def _takes_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's product of packed int8 computes it.

    It is the faster one for few rows of bfloat16 alone. It takes a transposed weight; and where K or N is no multiple
    of :data:`PACKED_SIZES` it may read beyond the end of the weight (it does with one column). It adds up in float32,
    one term after the other, which errs twice as much as an ordinary product does: too much for float32.
    """
    blocks = weight.numel() > 0 and weight.shape[0] % PACKED_SIZES == 0 and weight.shape[1] % PACKED_SIZES == 0
    few = x.dtype == torch.bfloat16 and 0 < x.shape[0] <= PACKED_ROWS and is_readable(x)
    return blocks and few and weight.stride() == (1, weight.shape[0])


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **unsupported: Any,
) -> Tensor:
    """``(x1 @ x2) · scale · pertoken_scale + bias`` of int8 matrices, rounded once; or the integers ``x1 @ x2 + bias``.

    Args:
        x1: int8 (..., K). x2: int8 (K, N).
        scale: (N,) or (1,), float32 or bfloat16. For an int32 result it must be given, and has no effect.
        pertoken_scale: float32 (M,), one per row of ``x1``; not for an int32 result.
        bias: (N,): int32, added before scaling; float32, or bfloat16 for a bfloat16 result, after it.
        output_dtype: float16 (5), bfloat16 (15), or int32 (3), which is not scaled.

    Raises:
        ValueError: a shape, dtype or argument that is not supported, K or N above 65535.
    """
    op = "npu_quant_matmul"
    reject_unsupported(op, unsupported)
    target = output_dtype if isinstance(output_dtype, torch.dtype) else OUTPUT_DTYPES.get(output_dtype or 0)
    if target is None or target not in BIASES:
        raise invalid(op, "output_dtype", output_dtype, "torch.float16 (5), torch.bfloat16 (15) or torch.int32 (3)")
    if x1.dtype != torch.int8 or x1.dim() < 2:
        raise invalid(op, "x1", x1, "int8 of shape (..., K), two or more dimensions")
    columns = _check_weight(op, "x2", x2, "x1", x1)
    if scale.dtype not in (torch.float32, torch.bfloat16) or tuple(scale.shape) not in ((columns,), (1,)):
        raise invalid(op, "scale", scale, f"float32 or bfloat16 of shape ({columns},) or (1,)")
    if scale.dtype == torch.bfloat16 and target == torch.float16:
        raise invalid(op, "scale", scale, "float32 where the result is float16")
    rows = x1.shape[-2]
    if target == torch.int32 and pertoken_scale is not None:
        raise invalid(op, "pertoken_scale", pertoken_scale, "None where the result is int32, which is not scaled")
    if pertoken_scale is not None and (pertoken_scale.dtype, pertoken_scale.shape) != (torch.float32, (rows,)):
        raise invalid(op, "pertoken_scale", pertoken_scale, f"float32 of shape ({rows},): one per row of x1")
    if bias is not None:
        if bias.dim() != 1:
            raise invalid(op, "bias", bias, f"shape ({columns},)")
        _check_vector(op, "bias", bias, columns, BIASES[target])
    sums = INTEGERS_IN_GRAPHS(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    if target == torch.int32:
        return sums
    y = sums.float() * scale.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    return y.to(target)


def integer_product(x1: Tensor, x2: Tensor) -> Tensor:
    """Exact sums of int8 (..., K) times int8 (K, N): at most 65,535 products of 2^14 each fit int32."""
    inner, columns = x2.shape
    rows = x1.flatten(0, -2)
    if rows.is_cpu and _int8_product_is_exact():
        # One row may have any stride, and PyTorch's product reads it wrong where that is 1: compiled graphs make such.
        rows = rows.contiguous().as_strided((rows.shape[0], inner), (inner, 1))
        sums = torch._int_mm(rows, x2)
    else:
        sums = integer_product_by_parts(rows, x2)
    return sums.view(*x1.shape[:-1], columns)


def integer_product_by_parts(rows: Tensor, weight: Tensor) -> Tensor:
    """:func:`integer_product` of (M, K), in float32, of as many inputs at a time as it adds up exactly."""
    sums = rows.new_zeros(rows.shape[0], weight.shape[1], dtype=torch.int32)
    for inputs, part in zip(rows.split(EXACT_SUMS, 1), weight.split(EXACT_SUMS), strict=True):
        sums += product_by_blocks(inputs.float(), part).int()
    return sums


@cache
def _int8_product_is_exact() -> bool:
    """Whether the processor multiplies 8-bit integers itself (VNNI, where it was measured), and PyTorch uses that.

    Where oneDNN is kept from VNNI (``ONEDNN_MAX_CPU_ISA``) its product silently limits sums of two to 16 bits.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(largest, largest) == 64 * 127**2).all())


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    dst_type: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """(int8 rows, their scales): scale = max|row| / 127, y = round(row / scale); a row of zeros has scale 0.

    Args:
        input: (..., H), two or more dimensions; bfloat16, float16, here float32, too.
        smooth_scales: (H,) of the same dtype: factors of the columns before quantisation.
        dst_type: int8 (1).

    Returns:
        int8 like ``input``, and float32 of its shape without the last dimension.

    Raises:
        ValueError: a shape, dtype or argument that is not supported.
    """
    op = "npu_dynamic_quant"
    reject_unsupported(op, unsupported)
    check_float(op, "input", input)
    if input.dim() < 2 or not input.shape[-1]:
        raise invalid(op, "input", input, "(..., H), two or more dimensions, H above 0")
    if dst_type not in INT8:
        raise invalid(op, "dst_type", dst_type, "torch.int8 (1)")
    wide = input.float()
    if smooth_scales is not None:
        if smooth_scales.dim() != 1:
            raise invalid(op, "smooth_scales", smooth_scales, f"shape ({input.shape[-1]},)")
        _check_vector(op, "smooth_scales", smooth_scales, input.shape[-1], (input.dtype,))
        wide = wide * smooth_scales.float()
    return quantised_rows(wide)


def quantised_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """float32 rows as int8, and their scales."""
    scale = wide.abs().amax(-1) / LARGEST
    whole = (wide / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).round()
    return whole.clamp(-128, 127).to(torch.int8), scale


def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x = x1 + x2 rounded to the dtype; its RMS norm times gamma, in float32, as int8 rows with scales.

    Args:
        x1, x2: (..., H), same shape and dtype.
        gamma: (H,), same dtype.
        output_mask: None, or [True, False]: only the first pair is computed.
        y_dtype: int8 (1).

    Returns:
        (y1 int8, y2 of no elements, x, scale1 float32 (...), scale2 of no elements)

    Raises:
        ValueError: a shape, dtype or argument that is not supported.
    """
    op = "npu_add_rms_norm_dynamic_quant"
    reject_unsupported(op, unsupported)
    check_float(op, "x1", x1)
    check_same_dtype(op, x1, x2=x2, gamma=gamma)
    if x1.dim() < 2 or x1.shape != x2.shape:
        raise invalid(op, "x2", x2, f"the shape of x1, {tuple(x1.shape)}, two or more dimensions")
    if gamma.shape != x1.shape[-1:]:
        raise invalid(op, "gamma", gamma, f"shape ({x1.shape[-1]},)")
    if output_mask is not None and list(output_mask) != [True, False]:
        raise invalid(op, "output_mask", output_mask, "None or [True, False]: there is one set of results")
    if y_dtype not in INT8:
        raise invalid(op, "y_dtype", y_dtype, "torch.int8 (1)")
    x = x1 + x2
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    y, scale = quantised_rows(wide * rstd * gamma.float())
    return y, y.new_empty(0), x, scale, scale.new_empty(0)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """SwiGLU of ``x · weight_scale · activation_scale``, in float32, as int8 rows with their scales.

    Args:
        x: int32 (rows, 2·H), the sums of an int8 product.
        weight_scale: float32 (2·H,) or (1, 2·H), one per column.
        activation_scale: float32 (rows,) or (rows, 1), one per row.
        activate_left: silu of the first half times the second; else of the second times the first.
        quant_mode: 1 (dynamic), which the schema's default is not.

    Returns:
        int8 (rows, H), float32 (rows,)

    Raises:
        ValueError: a shape, dtype or argument that is not supported.
    """
    op = "npu_dequant_swiglu_quant"
    reject_unsupported(op, unsupported)
    if quant_mode != 1:
        raise invalid(op, "quant_mode", quant_mode, "1 (dynamic)")
    if dst_type not in INT8:
        raise invalid(op, "dst_type", dst_type, "torch.int8 (1)")
    if round_mode not in (None, 0):
        raise invalid(op, "round_mode", round_mode, "0 (to nearest, ties to even)")
    if activate_dim not in (None, -1, 1):
        raise invalid(op, "activate_dim", activate_dim, "-1: the last dimension")
    if x.dtype != torch.int32 or x.dim() != 2 or x.shape[1] % 2 or not x.shape[1]:
        raise invalid(op, "x", x, "int32 of shape (rows, 2·H)")
    rows, width = x.shape
    if weight_scale is None:
        raise invalid(op, "weight_scale", weight_scale, f"float32 of shape ({width},) or (1, {width})")
    _check_vector(op, "weight_scale", weight_scale, width, (torch.float32,))
    wide = x.float() * weight_scale.reshape(1, width)
    if activation_scale is not None:
        if activation_scale.dtype != torch.float32 or tuple(activation_scale.shape) not in ((rows,), (rows, 1)):
            raise invalid(op, "activation_scale", activation_scale, f"float32 of shape ({rows},) or ({rows}, 1)")
        wide = wide * activation_scale.reshape(rows, 1)
    left, right = wide.chunk(2, -1)
    gate, up = (left, right) if activate_left else (right, left)
    return quantised_rows(torch.nn.functional.silu(gate) * up)


# ---- checks ---------------------------------------------------------------------------------------------------------
def _check_weight(op: str, name: str, weight: Tensor, x_name: str, x: Tensor) -> int:
    """N of an int8 weight (K, N) that fits ``x`` (..., K)."""
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise invalid(op, name, weight, "int8 of shape (K, N)")
    if max(weight.shape) > MAX_SIZE:
        raise invalid(op, name, weight, f"K and N of at most {MAX_SIZE}: keep such a head unquantised, or cut it")
    if x.shape[-1] != weight.shape[0]:
        raise invalid(op, x_name, x, f"a last dimension of {weight.shape[0]}, the K of {name}")
    return weight.shape[1]


def _check_vector(op: str, name: str, vector: Tensor, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if vector.dtype not in dtypes or tuple(vector.shape) not in ((size,), (1, size)):
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise invalid(op, name, vector, f"{wanted} of shape ({size},) or (1, {size})")


# One node each in a traced graph, so that a compiled graph reads int8, too, and calls what is called here.
_library = torch.library.Library("qwen2_npu", "FRAGMENT")
_library.define("dequantising_product(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("dequantising_product", dequantising_product, _key)
_library.impl("dequantising_product", lambda x, weight, scale, bias: x.new_empty(x.shape[0], weight.shape[1]), "Meta")
IN_GRAPHS = torch.ops.qwen2_npu.dequantising_product.default

_library.define("integer_product(Tensor x1, Tensor x2) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("integer_product", integer_product, _key)
_library.impl("integer_product", lambda x1, x2: x1.new_empty(*x1.shape[:-1], x2.shape[1], dtype=torch.int32), "Meta")
INTEGERS_IN_GRAPHS = torch.ops.qwen2_npu.integer_product.default
