"""A small model on the device, prompts for it, and what eager computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from tests.unit.small import small_config, small_stock, stock_weights

LAYERS = 1

Call = dict[str, torch.Tensor]


@cache
def weights() -> dict[str, torch.Tensor]:
    return stock_weights(small_stock(small_config(num_hidden_layers=LAYERS)))


def build(device: str, optimizations: Optimizations | None = None) -> Qwen2ForCausalLM:
    """The small model, eager."""
    model = Qwen2ForCausalLM.from_state_dict(
        small_config(num_hidden_layers=LAYERS), weights(), device=device, optimizations=optimizations
    )
    return model.eval()


def prompt(device: str, batch: int, tokens: int, *, ragged: bool = False) -> Call:
    """Random tokens; ``ragged``: the last row is padded on the left to half its length."""
    ids = torch.randint(1, 199, (batch, tokens), generator=torch.Generator().manual_seed(batch * 100 + tokens))
    mask = torch.ones_like(ids)
    if ragged:
        mask[-1, : tokens // 2] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(model: Any, call: Call, new_tokens: int) -> torch.Tensor:
    """Greedy tokens on the host."""
    return model.generate(**call, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False).cpu()
