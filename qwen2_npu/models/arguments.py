"""What callers pass to ``forward``, checked before anything is computed or written.

Shapes: B batch, S new tokens, T tokens including the past, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORED = ("cache_position", "is_first_iteration", "tokenizer")
"""What some version of ``generate`` hands on to every model, and this one does not need."""

REFUSED = {
    "num_logits_to_keep": "its name is logits_to_keep",
    "num_items_in_batch": "the loss is the mean over the labels of this call",
    "shift_labels": "pass labels: they are shifted here",
}
"""What the stock model acts on, or callers believe it does, and why it is not taken here."""


def check_names(arguments: dict[str, Any]) -> None:
    """Refuse keyword arguments that would have an effect which they do not have here.

    Raises:
        TypeError: with their names.
    """
    wrong = [name for name, value in arguments.items() if name not in IGNORED and value is not None]
    if wrong:
        reasons = "".join(f"; {name}: {REFUSED[name]}" for name in wrong if name in REFUSED)
        raise TypeError(f"Qwen2ForCausalLM.forward() takes no argument {', '.join(wrong)}{reasons}")


def tokens_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The one of the two that is given: (B, S) ids or (B, S, H) embeddings.

    Raises:
        ValueError: both or neither, another number of dimensions, or an empty prompt.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    wanted = "input_ids (batch, tokens)" if input_ids is not None else "inputs_embeds (batch, tokens, hidden)"
    if given.dim() != (2 if input_ids is not None else 3):
        raise ValueError(f"{wanted} expected, got shape {tuple(given.shape)}")
    if given.shape[0] == 0 or given.shape[1] == 0:
        raise ValueError(f"empty prompt: {wanted} has shape {tuple(given.shape)}; give every row at least one token")
    return given


def check_mask(mask: Any, batch: int, past: int, tokens: int) -> None:
    """Refuse an ``attention_mask`` that is not (B, T).

    Raises:
        ValueError: with the shape to pass.
    """
    if mask is None:
        return
    wanted = f"pass a 2-D mask (batch, past + new tokens) = ({batch}, {past + tokens}) of 0 and 1"
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}: {wanted}")
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: {wanted}")
    if mask.shape[1] != past + tokens:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but {past} are in the cache and {tokens} are new: {wanted}"
        )


def check_vocabulary(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse ids that no embedding exists for. Synchronises.

    Raises:
        ValueError: naming the id.
    """
    low, high = _extremes(input_ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}: does the tokenizer belong "
            "to this model?"
        )


def check_positions(positions: int, total: int, position_ids: torch.Tensor | None) -> None:
    """Refuse positions that the rotary table has no row for.

    Args:
        positions: the model's.
        total: tokens per row, past included.
        position_ids: to look into, which synchronises; None not to.

    Raises:
        ValueError: naming the position.
    """
    way_out = f"the model has max_position_embeddings={positions}: shorten the prompt, or raise it in the config"
    if total > positions:
        raise ValueError(f"{total} tokens need as many positions, {way_out}")
    if position_ids is not None:
        low, high = _extremes(position_ids)
        if low < 0 or high >= positions:
            raise ValueError(f"position_ids holds {low if low < 0 else high}, {way_out}")


def kept_positions(logits_to_keep: int | torch.Tensor, tokens: int) -> slice | torch.Tensor | None:
    """What indexes the positions whose logits are wanted; None for all as they stand.

    Args:
        logits_to_keep: the last so many, 0 for all; or whatever may index the tokens' axis, as for the stock model.
    """
    if not isinstance(logits_to_keep, int):
        return logits_to_keep
    return None if logits_to_keep == 0 or logits_to_keep >= tokens else slice(-logits_to_keep, None)


def _extremes(values: torch.Tensor) -> tuple[int, int]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return int(low), int(high)
