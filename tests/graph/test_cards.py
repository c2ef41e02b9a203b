"""A model on a card that is not the current one: graphs are captured and run on the card that the model is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, compile_model
from tests.graph.support import build, generate, prompt
from tests.graph.test_modes import MODES
from tests.unit.tokens import assert_same_tokens

CASES = [
    pytest.param(name, step, marks=() if (name, step) == ("npugraph_ex", LADDER[-1]) else pytest.mark.slow)
    for name in MODES
    for step in ("fused_qkv", LADDER[-1])
    if not (name == "torchair-static" and Optimizations.up_to(step).ifa_tiling)
]


@pytest.fixture
def cards() -> tuple[str, str]:
    """The current card, and another one."""
    if torch.npu.device_count() < 2:  # type: ignore[attr-defined]
        pytest.skip("needs two cards")
    current = torch.npu.current_device()  # type: ignore[attr-defined]
    return f"npu:{current}", f"npu:{0 if current else 1}"


@pytest.mark.parametrize(("name", "step"), CASES)
def test_tokens_are_the_cpus_on_either_card(name: str, step: str, cards: tuple[str, str]) -> None:
    optimizations = Optimizations.up_to(step)
    call: dict[str, Any] = {"batch": 2, "tokens": 9, "ragged": True}
    reference = build("cpu", optimizations)
    expected = generate(reference, prompt("cpu", **call), 3)
    torch._dynamo.reset()
    models = {card: compile_model(build(card, optimizations), **MODES[name]) for card in reversed(cards)}
    assert len(models) == 2
    for card in (*models, cards[1]):
        found = generate(models[card], prompt(card, **call), 3)
        assert_same_tokens(found, expected, reference, prompt("cpu", **call), where=card)
        assert f"npu:{torch.npu.current_device()}" == cards[0]  # type: ignore[attr-defined]
