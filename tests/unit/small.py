"""A random stock model small enough to build in milliseconds, and its folder."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM as StockQwen2

from qwen2_npu.conformance.accuracy.stock import uninitialised

V4 = transformers.__version__.startswith("4.")


def small_config(**changes: Any) -> Qwen2Config:
    values: dict[str, Any] = {
        "vocab_size": 199, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = Qwen2Config(**(values | changes))
    config._attn_implementation = "eager"
    return config


def small_stock(config: Qwen2Config | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> StockQwen2:
    """A stock model with weights large enough that logits differ clearly."""
    model = uninitialised(config if config is not None else small_config()).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.08 if parameter.dim() > 1 else 0.3)
    return model.to(dtype)


def stock_weights(model: StockQwen2) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
