"""Matrix products in torch_npu's forms, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.eager.gradients import gradients

Tensor = torch.Tensor


def fast_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


FFN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "fastgelu": fast_gelu,
    "silu": F.silu,
}
GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "swiglu": F.silu,
    "reglu": F.relu,
}
"""Of two halves: activation(first) · second."""


def matmul_backward(grad: Tensor, a: Tensor, b: Tensor, mask: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return gradients(torch.matmul, (a, b), grad, mask)


def matmul_double_backward(
    grad_a: Tensor | None, grad_b: Tensor | None, grad: Tensor, a: Tensor, b: Tensor, mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``matmul_backward`` by its grad, a and b."""

    def backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        a, b = a.requires_grad_(), b.requires_grad_()
        return torch.autograd.grad(torch.matmul(a, b), (a, b), grad, create_graph=True)

    return gradients(backward, (grad, a, b), (grad_a, grad_b), mask)


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(F.linear, (x, weight), grad)


def bmm(x: Tensor, mat2: Tensor, output_sizes: Sequence[int]) -> Tensor:
    product = torch.matmul(x, mat2)
    return product.reshape(output_sizes) if output_sizes else product


def _bmm_backward(which: int) -> Callable[..., Tensor]:
    def backward(grad: Tensor, mat1: Tensor, mat2: Tensor, size: Sequence[int]) -> Tensor:
        found = gradients(torch.matmul, (mat1, mat2), grad, [which == 0, which == 1])[which]
        return found.reshape(size) if size else found  # type: ignore[union-attr, return-value]

    return backward


def fused_matmul(
    x1: Tensor, x2: Tensor, *, bias: Tensor | None = None, x3: Tensor | None = None, fused_op_type: str = ""
) -> Tensor:
    """x1 @ x2 + bias, then ``fused_op_type``: add or mul with x3, gelu, relu."""
    y = x1.float() @ x2.float()
    if bias is not None:
        y = y + bias.float()
    after: dict[str, Callable[[], Tensor]] = {
        "": lambda: y,
        "16cast32": lambda: y,
        "add": lambda: y + _third(x3, fused_op_type).float(),
        "mul": lambda: y * _third(x3, fused_op_type).float(),
        "gelu_erf": lambda: F.gelu(y),
        "gelu_tanh": lambda: F.gelu(y, approximate="tanh"),
        "relu": lambda: F.relu(y),
    }
    if fused_op_type not in after:
        raise ValueError(f"npu_fused_matmul: fused_op_type={fused_op_type!r}; one of {sorted(after)} is known")
    return after[fused_op_type]().to(torch.float32 if fused_op_type == "16cast32" else x1.dtype)


def _third(x3: Tensor | None, fused_op_type: str) -> Tensor:
    if x3 is None:
        raise ValueError(f"npu_fused_matmul: fused_op_type={fused_op_type!r} needs x3")
    return x3


def wide_product(name: str) -> Callable[..., Tensor]:
    """mm, bmm, addmm or baddbmm of narrow operands with a result in ``out_dtype``, never rounded in between."""
    function = getattr(torch, name)

    def product(*args: Any, **kwargs: Any) -> Tensor:
        *operands, dtype = args
        return function(*(value.to(dtype) for value in operands), **kwargs)

    return product


def _wide_product_out(name: str) -> Callable[..., Tensor]:
    product = wide_product(name)

    def write(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        result = product(*args, **kwargs)
        return out.resize_(result.size()).copy_(result)

    return write


def ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    expert_tokens: Sequence[int] | None = None,
    expert_tokens_index: Sequence[int] | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    inner_precise: int | None = None,
    **quantized: Any,
) -> Tensor:
    """activation(x @ weight1 + bias1) @ weight2 + bias2, by one expert or, with 3-D weights, by several.

    Args:
        x: (…, K). weight1: ([E,] K, N1). weight2: ([E,] N1 or N1 / 2, N2).
        expert_tokens: how many rows each expert has; expert_tokens_index: where its rows end.
    """
    given = [name for name, value in quantized.items() if value is not None]
    if given:
        raise NotImplementedError(f"npu_ffn: {', '.join(given)}: quantised weights are not emulated")
    if weight1.dim() == 2:
        return _ffn(x, weight1, weight2, activation, bias1, bias2)
    ends = expert_tokens_index
    if ends is None:
        ends = torch.tensor(expert_tokens, dtype=torch.int64).cumsum(0).tolist()
    out, start = x.new_zeros(*x.shape[:-1], weight2.shape[-1]), 0
    for expert, end in enumerate(ends):
        biases = [None if bias is None else bias[expert] for bias in (bias1, bias2)]
        out[start:end] = _ffn(x[start:end], weight1[expert], weight2[expert], activation, *biases)
        start = end
    return out


def _ffn(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, bias1: Tensor | None, bias2: Tensor | None
) -> Tensor:
    hidden = x.float() @ weight1.float()
    if bias1 is not None:
        hidden = hidden + bias1.float()
    if activation in GATED_ACTIVATIONS:
        gate, up = hidden.chunk(2, -1)
        hidden = GATED_ACTIVATIONS[activation](gate) * up
    elif activation in FFN_ACTIVATIONS:
        hidden = FFN_ACTIVATIONS[activation](hidden)
    else:
        known = ", ".join([*FFN_ACTIVATIONS, *GATED_ACTIVATIONS])
        raise ValueError(f"npu_ffn: activation={activation!r}; one of {known} is known")
    y = hidden.to(x.dtype).float() @ weight2.float()
    return (y if bias2 is None else y + bias2.float()).to(x.dtype)


def transpose_batchmatmul(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    """A batched product of permuted operands, itself permuted: by default (B, M, K) @ (B, K, N) to (M, B, N)."""
    if bias is not None or scale is not None or batch_split_factor not in (None, 1):
        raise NotImplementedError("npu_transpose_batchmatmul: bias, scale and batch_split_factor are not emulated")
    product = x.permute(*(perm_x1 or (0, 1, 2))) @ weight.permute(*(perm_x2 or (0, 1, 2)))
    return product.permute(*(perm_y or (1, 0, 2))).contiguous()


TABLE: dict[str, Callable[..., Any]] = {
    "matmul_backward": matmul_backward,
    "matmul_double_backward": matmul_double_backward,
    "npu_linear": F.linear,
    "npu_linear_backward": linear_backward,
    "npu_bmmV2": bmm,
    "npu_bmm_v2_mat1_backward": _bmm_backward(0),
    "npu_bmm_v2_mat2_backward": _bmm_backward(1),
    "npu_fused_matmul": fused_matmul,
    "npu_ffn": ffn,
    "npu_transpose_batchmatmul": transpose_batchmatmul,
    **{f"{name}.dtype": wide_product(name) for name in ("mm", "bmm", "addmm", "baddbmm")},
    **{f"{name}.dtype_out": _wide_product_out(name) for name in ("mm", "bmm", "addmm", "baddbmm")},
}
