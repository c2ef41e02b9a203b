"""Checkpoints of the same architecture, by their published configurations: what is not size is as it was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance.accuracy.stock import stock_from_pretrained
from qwen2_npu.errors import UnsupportedError
from tests.accuracy.test_as_stock_model import differences
from tests.unit.small import small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B-Instruct": {
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 21,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "tie_word_embeddings": True,
    },
    "Qwen2.5-72B": {
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "max_window_layers": 80, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": 131072,
    },
    "Qwen2.5-Math-7B": {
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 4096, "max_window_layers": 28,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
    },
    "Qwen2.5-7B-Instruct-1M": {
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 1010000,
        "max_window_layers": 28, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "sliding_window": 32768,
    },
    "Qwen2.5-7B-Instruct with YaRN": {
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "max_window_layers": 28,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 131072,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "QwQ-32B": {
        "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 40960, "max_window_layers": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": 32768,
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
        "use_mrope": False,
    },
}  # fmt: skip
"""Name -> fields of its config.json. use_sliding_window is false in all of them."""


def folder_of(name: str, path: Path) -> Path:
    """The folder with its fields as 4.37 to 4.46 wrote them, few layers, and heads of four values."""
    values = PUBLISHED[name]
    sizes = {"hidden_size": 4 * values["num_attention_heads"], "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {field: values[field] for field in ("num_attention_heads", "num_key_value_heads")}
    tied = values.get("tie_word_embeddings", False)
    stock = small_stock(small_config(**sizes, **heads, tie_word_embeddings=tied))
    path.mkdir()
    written = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 199,
        "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "float32", "use_cache": True,
        "use_sliding_window": False, "tie_word_embeddings": False, "bos_token_id": 5, "eos_token_id": 7,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(written | sizes | values))
    save_file(stock_weights(stock), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_text_are_the_stock_model_s(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    folder, device = folder_of(name, tmp_path / "model"), str(pytestconfig.option.device)
    if IS_V4 and "rope_scaling" in PUBLISHED[name]:
        with pytest.raises(UnsupportedError, match="rope_scaling="):
            Qwen2ForCausalLM.from_pretrained(folder)
        return
    stock: Any = stock_from_pretrained(folder, device=device)
    ids = torch.randint(8, 199, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = stock(**given).logits[mask.bool()]
        text = stock.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for optimizations in (Optimizations.none(), Optimizations.all()):
            model = Qwen2ForCausalLM.from_pretrained(folder, device=device, optimizations=optimizations)
            assert not list(differences(model(**given).logits[mask.bool()], expected))
            found = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert_same_tokens(found, text, stock, given)
