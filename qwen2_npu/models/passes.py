"""What one ``forward`` is asked to compute, what computes it, and its loss.

Shapes: B batch, S new tokens, T tokens including the past, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from qwen2_npu.models.arguments import IGNORED_LABEL
from qwen2_npu.models.decoder import Record


@dataclass
class Pass:
    """What one ``forward`` is asked to compute, checked.

    Attributes:
        given: (B, S) ids or (B, S, H) embeddings.
        mask: (B, T) of 0 and 1.
        position_ids: (B, S), or None for the number of tokens before each, padding included.
        past: tokens per row in the cache, padding included.
        wanted: positions whose logits are wanted; None for all.
        record: where hidden states and attention weights go; None where nobody asks for them.
    """

    given: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    past: int
    wanted: slice | torch.Tensor | None
    record: Record | None

    @property
    def looked_into(self) -> bool:
        """Whether values of ids and positions are checked before: a decode step must not wait for a device."""
        return self.past == 0 or self.given.shape[1] > 1 or self.given.device.type == "cpu"

    @property
    def total(self) -> int:
        """Tokens per row, past and padding included."""
        return self.past + self.given.shape[1]


class Prepared(NamedTuple):
    """A pass that can be run, and the cache that it writes."""

    run: Callable[[], torch.Tensor]
    cache: Any


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Mean cross-entropy of token i+1 given logits i, float32, -100 ignored: the stock model's loss, without the labels
    that stand after padding, since logits at padding are unspecified.

    Args:
        live: (B, S) 1 where a position is not padding; None where none is.

    Raises:
        ValueError: labels of another shape than the logits'.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape[:2])}: pass as many")
    shifted = labels[:, 1:].to(logits.device)
    if live is not None:
        shifted = shifted.masked_fill(live[:, :-1] == 0, IGNORED_LABEL)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), shifted.flatten(), ignore_index=IGNORED_LABEL)
