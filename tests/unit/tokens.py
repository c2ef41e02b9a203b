"""Comparing generated tokens: where two texts part, with both tokens and how near they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def assert_same_tokens(
    found: torch.Tensor,
    expected: torch.Tensor,
    model: Any = None,
    call: Mapping[str, torch.Tensor] | None = None,
    *,
    where: str = "",
) -> None:
    """(B, T) token ids that must be the same; prompts included or not.

    Args:
        model: to ask, eagerly, for the margin between the two tokens where the texts part.
        call: what ``generate`` was given: its ``attention_mask`` is continued with ones.
        where: whose tokens ``found`` are, for the message.

    Raises:
        AssertionError: says row, position, both tokens, the margin if there is a model, and how many rows differ.
    """
    found, expected = found.cpu(), expected.cpu()
    prefix = f"{where}: " if where else ""
    assert found.shape == expected.shape, f"{prefix}tokens {list(found.shape)}, expected {list(expected.shape)}"
    differing = (found != expected).nonzero().tolist()
    if not differing:
        return
    row, position = differing[0]
    theirs, ours = int(expected[row, position]), int(found[row, position])
    text = f"{prefix}row {row}, position {position}: token {ours}, expected {theirs}"
    if model is not None and position > 0:
        text += f", margin {_margin(model, expected[row, :position], theirs, ours, call, row):.3g}"
    rows = len({index for index, _ in differing})
    raise AssertionError(f"{text}; {rows} of {len(expected)} rows differ")


@torch.no_grad()
def _margin(
    model: Any, before: torch.Tensor, theirs: int, ours: int, call: Mapping[str, torch.Tensor] | None, row: int
) -> float:
    """The model's logit of the expected token less that of the one found, after the tokens that agree."""
    if getattr(model, "compiled_steps", None):
        model.compiled_steps = {}  # the graphs are under suspicion
    device = next(model.parameters()).device
    ids = before.unsqueeze(0).to(device)
    mask = torch.ones_like(ids)
    if call is not None and "attention_mask" in call:
        given = call["attention_mask"][row]
        mask[0, : len(given)] = given.to(device)[: ids.shape[1]]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).logits[0, -1]
    return float(logits[theirs].double() - logits[ours].double())
