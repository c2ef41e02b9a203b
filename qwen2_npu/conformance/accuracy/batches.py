"""What the models are asked: left-padded prompts, and the shapes of batches that the suite covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts of B rows, P columns.

    ``input_ids`` (B, P) int64, ``attention_mask`` (B, P) int64: 1 where there is a token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], *, pad_token_id: int = 0) -> Batch:
        """Pads ``prompts`` on the left to the longest.

        Raises:
            ValueError: no prompts, or an empty one.
        """
        if not prompts or any(not len(prompt) for prompt in prompts):
            raise ValueError("a batch needs at least one prompt, and every prompt at least one token")
        width = max(len(prompt) for prompt in prompts)
        ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return cls(torch.tensor(ids), torch.tensor(mask))

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return self.attention_mask.sum(dim=1).tolist()

    def nothing_forced(self) -> npt.NDArray[np.int64]:
        """The tokens forced after the prompts, where there are none."""
        return np.empty((len(self.input_ids), 0), np.int64)

    def rows(self) -> list[Batch]:
        """Each row alone, without its padding."""
        return [
            Batch(ids[mask.bool()].unsqueeze(0), mask[mask.bool()].unsqueeze(0))
            for ids, mask in zip(self.input_ids, self.attention_mask, strict=True)
        ]


BATCH_SHAPES: dict[str, tuple[int, ...]] = {
    "one": (17,),
    "four": (17, 17, 17, 17),
    "ragged": (17, 9, 1, 12),
}
"""Name -> tokens per row. Odd lengths: no kernel's blocking divides them. One row has a single token."""


def random_batch(shape: str, vocab_size: int, *, seed: int = 0) -> Batch:
    """Random tokens in one of :data:`BATCH_SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(vocab_size, (n,), generator=generator).tolist() for n in BATCH_SHAPES[shape]])


def text_batch(shape: str, token_ids: Sequence[int], *, pad_token_id: int = 0) -> Batch:
    """Windows of a tokenised text in one of :data:`BATCH_SHAPES`, spread over the text.

    Raises:
        ValueError: the text is shorter than the longest row.
    """
    lengths = BATCH_SHAPES[shape]
    rows = [list(token_ids[start : start + n]) for start, n in zip(_starts(shape, token_ids), lengths, strict=True)]
    return Batch.of(rows, pad_token_id=pad_token_id)


def text_continuation(shape: str, token_ids: Sequence[int], steps: int) -> npt.NDArray[np.int64]:
    """(B, steps) tokens: what follows each row of :func:`text_batch` in the text, which begins anew at its end."""
    ends = np.array(_starts(shape, token_ids)) + BATCH_SHAPES[shape]
    return np.asarray(token_ids, np.int64)[(ends[:, None] + np.arange(steps)) % len(token_ids)]


def random_continuation(shape: str, vocab_size: int, steps: int, *, seed: int = 1) -> npt.NDArray[np.int64]:
    """(B, steps) random tokens, to follow those of :func:`random_batch`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (len(BATCH_SHAPES[shape]), steps), generator=generator).numpy()


def _starts(shape: str, token_ids: Sequence[int]) -> list[int]:
    """Where in the text each row begins."""
    lengths = BATCH_SHAPES[shape]
    spare = len(token_ids) - max(lengths)
    if spare < 0:
        raise ValueError(f"the text has {len(token_ids)} tokens; batch shape {shape!r} needs {max(lengths)}")
    return [spare * row // max(len(lengths) - 1, 1) for row in range(len(lengths))]
