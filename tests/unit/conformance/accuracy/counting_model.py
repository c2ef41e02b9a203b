"""A model whose every answer can be worked out by hand: it says what it was given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from qwen2_npu.compat import CACHE_NAME

VOCABULARY = 64
HIDDEN = 3


def answer(seen: list[int], position: int) -> int:
    """The token that the model prefers after the live tokens ``seen``, the last of which has this position."""
    return (7 * sum(seen) + 3 * len(seen) + position) % VOCABULARY


class CountingModel(torch.nn.Module):
    """Prefers :func:`answer` by 1. Its cache is the live tokens of each row; padding prefers token 0.

    Attributes:
        calls: the arguments of every call.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.calls: list[dict[str, Any]] = []
        self.config = SimpleNamespace(model_type="qwen2")
        self.dtype = dtype

    def allocate_cache(self, rows: int, capacity: int) -> list[list[int]]:
        self.allocated = (rows, capacity)
        return [[] for _ in range(rows)]

    def forward(self, **given: Any) -> SimpleNamespace:
        self.calls.append(given)
        ids, mask, positions = given["input_ids"], given["attention_mask"], given["position_ids"]
        rows, count = ids.shape
        cache = [list(row) for row in given.get(CACHE_NAME) or [[]] * rows]
        logits = torch.zeros(rows, count, VOCABULARY, dtype=self.dtype)
        for row in range(rows):
            for column in range(count):
                if mask[row, mask.shape[1] - count + column]:
                    cache[row].append(int(ids[row, column]))
                    logits[row, column, answer(cache[row], int(positions[row, column]))] = 1.0
        hidden = logits[..., :HIDDEN] + 5
        keep = given.get("logits_to_keep", count)
        out = {"logits": logits[:, -keep:], CACHE_NAME: cache if given["use_cache"] else None}
        return SimpleNamespace(**out, hidden_states=(hidden - 1, hidden) if given.get("output_hidden_states") else None)

    def generate(self, **given: Any) -> torch.Tensor:
        self.generated = given
        tokens, mask = given["input_ids"], given["attention_mask"]
        for _ in range(given["max_new_tokens"]):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self.forward(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        return tokens
