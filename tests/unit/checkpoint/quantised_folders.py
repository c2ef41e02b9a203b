"""Small checkpoints with 8-bit weights as llm-compressor writes them, made without this project's own packing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2_npu.checkpoint.weights import stock_shapes
from tests.unit.checkpoint.merges import config_of, write_folder

SCHEMES = ("w8a16", "w8a8")


def quantization_config(scheme: str, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """As llm-compressor writes it, but for what may be left out."""
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


def quantised_config(scheme: str, heads: int = 4, kv_heads: int = 2, **changes: Any) -> Any:
    ignore = changes.pop("ignore", ("lm_head",))
    return config_of(heads, kv_heads, quantization_config=quantization_config(scheme, ignore), **changes)


def quantised_weights(config: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Stock tensors: integers of the whole range, a scale that no other row has, and floating-point numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = stock_shapes(config)
    found: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("_scale"):
            found[name] = (torch.rand(shape, generator=generator) * 1e-3 + 5e-4).to(dtype)
        elif f"{name}_scale" in shapes:
            found[name] = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        else:
            found[name] = torch.randn(shape, generator=generator).to(dtype)
    return found


def packed_by_hand(integers: torch.Tensor) -> torch.Tensor:
    """Value j of a row, plus 128, in the bits from 8 · (j mod 4) on of int32 j // 4."""
    rows, columns = integers.shape
    words = np.zeros((rows, -(-columns // 4)), dtype=np.uint32)
    for column in range(columns):
        codes = (integers[:, column].to(torch.int64) + 128).numpy().astype(np.uint32)
        words[:, column // 4] |= codes << np.uint32(8 * (column % 4))
    return torch.from_numpy(words.view(np.int32))


def as_stored(weights: Mapping[str, torch.Tensor], scheme: str) -> dict[str, torch.Tensor]:
    """Stock tensors as the files of that scheme have them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if tensor.dtype == torch.int8 and scheme == "w8a16":
            module = name.removesuffix("weight")
            found[f"{module}weight_packed"] = packed_by_hand(tensor)
            found[f"{module}weight_shape"] = torch.tensor(tensor.shape)
        else:
            found[name] = tensor
    return found


def in_float64(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What stock tensors stand for, without scales."""
    return {
        name: tensor.double() * (weights[f"{name}_scale"].double() if tensor.dtype == torch.int8 else 1)
        for name, tensor in weights.items()
        if not name.endswith("_scale")
    }


def write_quantised(folder: Path, scheme: str, *, shards: int | None = None, **changes: Any) -> Path:
    config = quantised_config(scheme, **changes)
    return write_folder(folder, config, as_stored(quantised_weights(config), scheme), shards)
