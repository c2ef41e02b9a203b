"""Small checkpoints to merge, and what the guide's own script makes of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from qwen2_npu.checkpoint.weights import stock_shapes

HEADS = {"0.5B": (14, 2), "1.5B": (12, 2), "7B": (28, 4), "72B": (64, 8)}
"""Query and kv heads of the dense sizes."""


def config_of(heads: int, kv_heads: int, *, layers: int = 2, **changes: Any) -> Qwen2Config:
    """Heads of two values each, and an MLP that as many ranks divide as heads can be cut for."""
    return Qwen2Config(
        vocab_size=24, hidden_size=2 * heads, intermediate_size=168, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **changes,
    )  # fmt: skip


def weights_of(config: Qwen2Config, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Every value of a tensor is another one, as far as the dtype has so many."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in stock_shapes(config).items()}


def write_folder(
    folder: Path,
    config: Qwen2Config,
    weights: Mapping[str, torch.Tensor],
    shards: int | None = None,
) -> Path:
    """A Hugging Face folder with files beside the weights; in ``shards`` files, whose borders lie anywhere."""
    folder.mkdir(parents=True)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}\n")
    (folder / "LICENSE").write_text("as you like")
    names = list(weights)
    if shards is None:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def guide_merged(config: Qwen2Config, weights: Mapping[str, torch.Tensor], tp_size: int) -> dict[str, torch.Tensor]:
    """What ``merge_qkv_weight`` of the upstream guide leaves in the model: line by line its slices."""
    merged = {name: tensor for name, tensor in weights.items() if not any(p in name for p in ("q_pr", "k_pr", "v_pr"))}
    for layer in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            scope = f"model.layers.{layer}.self_attn"
            parts = [weights[f"{scope}.{part}.{kind}"] for part in ("q_proj", "k_proj", "v_proj")]
            sizes = [part.shape[0] // tp_size for part in parts]
            merged[f"{scope}.qkv.{kind}"] = torch.cat(
                [
                    part[j * size : (j + 1) * size]
                    for j in range(tp_size)
                    for part, size in zip(parts, sizes, strict=True)
                ]
            )
    return merged


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder, and its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def open_below(*folders: Path) -> list[str]:
    """What this process has open in these folders, and which of them."""
    found: list[str] = []
    for handle in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them
            found.append(os.readlink(f"/proc/self/fd/{handle}"))
    return [path for path in found if any(Path(path).is_relative_to(folder) for folder in folders)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )
