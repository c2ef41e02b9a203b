"""Small models with 8-bit weights: their configuration, and random ones."""

from __future__ import annotations

from typing import Any

import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint.quantization import FIELD, described
from qwen2_npu.models.quantized import QuantizedLinear
from tests.unit.small import small_config

SCHEMES = ("w8a16", "w8a8")


def quantised_config(scheme: str, ignore: tuple[str, ...] = ("lm_head",), **changes: Any) -> Any:
    return small_config(**{FIELD: described(scheme, ignore)}, **changes)


def quantised_model(
    config: Any, optimizations: Optimizations | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A model with random weights that make logits differ clearly."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config, optimizations).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_scale"):
                parameter.uniform_(0.5e-3, 1.5e-3)
            elif parameter.is_floating_point():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.08 if parameter.dim() > 1 else 0.3)
    return model


def products(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def dequantised(model: Any) -> dict[str, torch.Tensor]:
    """The stock tensors that a model without fused products computes with, in its dtype."""
    state = dict(model.state_dict())
    for name in products(model):
        weight, scale = state.pop(f"{name}.weight"), state.pop(f"{name}.weight_scale")
        state[f"{name}.weight"] = (weight.double() * scale.double()).to(scale.dtype)
    return state


STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def like(plain: Any, optimizations: Optimizations) -> Any:
    """A model with other switches, and the weights of one without fused products."""
    model = Qwen2ForCausalLM(plain.config, optimizations).eval().to(plain.dtype)
    given = plain.state_dict()
    state = {}
    for name in model.state_dict():
        *scope, module, kind = name.split(".")
        parts = [".".join([*scope, part, kind]) for part in STACKED.get(module, (module,))]
        state[name] = torch.cat([given[part] for part in parts])
    model.load_state_dict(state)
    return model
