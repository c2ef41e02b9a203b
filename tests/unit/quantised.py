"""Small models with 8-bit weights: their configuration, and random ones."""

from __future__ import annotations

from typing import Any

import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.models.quantized import QuantizedLinear
from tests.unit.small import small_config

SCHEMES = ("w8a16", "w8a8")


def quantization_config(scheme: str, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """As a folder in the format of compressed-tensors has it."""
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": token if scheme == "w8a8" else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def quantised_config(scheme: str, ignore: tuple[str, ...] = ("lm_head",), **changes: Any) -> Any:
    return small_config(quantization_config=quantization_config(scheme, ignore), **changes)


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
