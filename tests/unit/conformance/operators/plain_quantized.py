"""The operators of 8-bit weights, in the manner of ``plain``."""

from __future__ import annotations

from typing import Any

import torch

NUMBERS = {5: torch.float16, 15: torch.bfloat16}
INT32 = 3


def rows(fault: str, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    axis = -2 if fault == "scale_per_column" else -1
    largest = wide.abs().amax(axis)
    if fault == "first_scale_for_every_row":
        largest = largest[..., :1].expand(wide.shape[:-1]).clone()
    if fault == "signed_maximum":
        largest = wide.amax(-1)
    scale = largest / (128 if fault == "divided_by_128" else 127)
    divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(axis)
    y = wide / divisor
    y = y.trunc() if fault == "truncated" else y.round()
    return y.clamp(-128, 127).to(torch.int8), scale


def dynamic_quant(fault: str, input: torch.Tensor, **t: Any) -> Any:
    wide = input.float()
    if "smooth_scales" in t and fault != "smooth_scales_ignored":
        wide = wide * t["smooth_scales"].float()
    return rows(fault, wide)


def add_rms_norm_dynamic_quant(
    fault: str, x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6, **t: Any
) -> Any:
    x = x1 if fault == "residual_not_added" else x1 + x2
    wide = x.double()
    y = wide / (wide.square().mean(-1, keepdim=True) + (0 if fault == "epsilon_ignored" else epsilon)).sqrt()
    y = y if fault == "gamma_ignored" else y * gamma.double()
    if fault == "norm_rounded":
        y = y.to(x.dtype)
    quantised, scale = rows(fault, y.float())
    return quantised, quantised.new_empty(0), x, scale, scale.new_empty(0)


def neighbour(fault: str, scale: torch.Tensor) -> torch.Tensor:
    return scale.roll(1, -1) if fault == "scale_of_the_neighbour" else scale


def weight_quant_batchmatmul(
    fault: str, x: torch.Tensor, weight: torch.Tensor, antiquant_scale: torch.Tensor, **t: Any
) -> Any:
    scale = neighbour(fault, antiquant_scale.float()).reshape(1, -1)
    wide = weight.float() + (1 if fault == "zero_point_of_one" else 0)
    if fault == "weight_unsigned":
        wide = torch.where(wide < 0, wide + 256, wide)
    if fault == "scale_of_the_first_column":
        scale = scale[:, :1]
    if fault == "scale_by_row":
        wide = wide * scale.reshape(-1).repeat(wide.shape[0])[: wide.shape[0], None]
    y = (x.double() @ wide.double()).float() * (1 if fault == "scale_by_row" else scale)
    if "bias" in t and fault != "bias_forgotten":
        y = y + t["bias"].float()
    return y.to(x.dtype)


def quant_matmul(fault: str, x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, **t: Any) -> Any:
    sums = x1.double() @ x2.double()
    if fault == "sums_in_float32":
        sums = (x1.float() @ x2.float()).double()
    bias, token = t.get("bias"), t.get("pertoken_scale")
    if t["output_dtype"] == INT32:
        added = 0 if bias is None or fault == "bias_forgotten" else bias
        return sums.short().int() if fault == "sums_in_16_bits" else sums.int() + added
    whole = bias is not None and bias.dtype == torch.int32
    if bias is not None and whole != (fault == "bias_on_the_other_side"):
        sums = sums + bias.double() if fault != "bias_forgotten" else sums
    y = sums.float() * neighbour(fault, scale)
    if token is not None and fault != "token_scale_ignored":
        token = token[:1].expand(token.shape) if fault == "first_token_scale_for_every_row" else token
        y = y * token.unsqueeze(-1)
    if bias is not None and whole == (fault == "bias_on_the_other_side") and fault != "bias_forgotten":
        y = y + bias.float()
    if fault == "sums_in_16_bits":
        y = sums.short().float() * scale * (1 if token is None else token.unsqueeze(-1))
    return y.to(NUMBERS[t["output_dtype"]])


def dequant_swiglu_quant(fault: str, x: torch.Tensor, weight_scale: torch.Tensor, **t: Any) -> Any:
    wide = x.float() * neighbour(fault, weight_scale).reshape(1, -1)
    token = t.get("activation_scale")
    if token is not None and fault != "activation_scale_ignored":
        token = token.reshape(-1, 1)
        wide = wide * (token[:1] if fault == "first_activation_scale_for_every_row" else token)
    left, right = wide.chunk(2, -1)
    if t["activate_left"] == (fault == "halves_swapped"):
        left, right = right, left
    silu = left * left.exp() / (1 + left.exp()) if fault == "exponential_overflows" else left / (1 + (-left).exp())
    return rows(fault, silu * right)


PLAIN = {
    "npu_dynamic_quant": dynamic_quant,
    "npu_add_rms_norm_dynamic_quant": add_rms_norm_dynamic_quant,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_quant_matmul": quant_matmul,
    "npu_dequant_swiglu_quant": dequant_swiglu_quant,
}
