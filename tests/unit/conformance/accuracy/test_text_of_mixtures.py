"""When a choice of experts excuses a text that parts: each condition at its limit, on numbers written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.locate_error import Divergence
from qwen2_npu.conformance.accuracy.routing import Choices
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace

ROWS, WIDTH, STEPS, NOISE = 2, 3, 3, 0.25
VALID = np.array([[False, True, True], [True, True, True]])
LOGITS = (1.5, 1.0, 0.0, -1.0)
NEAR, FAR = 1, 2
"""Experts in the place of 0: their router logits are 2 × the noise below it, and more."""
Place = tuple[str, int, int]
"""Phase, row and column."""


def trace(off: float = 0.0) -> Trace:
    """``off``: what the last logit of tokens and of experts is off by; of the reference it is the noise."""

    def logits(columns: int) -> Any:
        values = np.tile(np.array(LOGITS), (ROWS, columns, 1))
        values[..., -1] -= off
        return values

    def choices(columns: int) -> Choices:
        said = np.tile(np.array([1.0, 0.5, 0.0, -1.0 - off]), (1, ROWS, columns, 1))
        return Choices((4,), said, np.zeros((1, ROWS, columns, 1), np.int64))

    routing = {"prefill": choices(WIDTH), "decode": choices(STEPS)}
    return Trace(logits(WIDTH), logits(STEPS), np.zeros((ROWS, STEPS), int), VALID, routing=routing)


def excused(position: int, *chosen: tuple[Place, int], row: int = 1, **altered: Any) -> list[Divergence]:
    """A text of ``row`` that parts after ``position`` tokens, where ours would have chosen these experts."""
    ours, baseline, reference = trace(), trace(), trace(NOISE)
    for (phase, there, column), expert in chosen:
        ours.routing[phase].wanted[0, there, column] = expert
    if altered:
        said, stock, exact = (
            each.prefill_logits[row, -1] if position == 0 else each.decode_logits[row, position - 1]
            for each in (ours, baseline, reference)
        )
        said[:] = altered.get("said", said)
        stock[0] = exact[0] = altered.get("best", LOGITS[0])
    return text.excused_by_routing(
        [Divergence(row, position, 0, 1, (9.0, 0.0), 1e-6)], ours, baseline, reference, torch.float64
    )


def test_a_near_tie_before_it_excuses_and_is_named() -> None:
    (found,) = excused(0, (("prefill", 1, 1), NEAR), (("prefill", 1, 2), NEAR))
    assert found.excused
    assert found.routing.startswith("routing in prefill, layer 4 row 1 position 1: baseline chooses expert 0")


@pytest.mark.parametrize("position", [0, 1, 3])
def test_without_another_choice_nothing_is_excused(position: int) -> None:
    assert not excused(position)[0].excused


@pytest.mark.parametrize(("row", "length"), [(0, 2), (1, 3)])
@pytest.mark.parametrize("position", [1, 2])
def test_only_choices_of_the_tokens_before_it_count(row: int, length: int, position: int) -> None:
    """The last of them is the token that it parts after; its number counts the tokens of the row, not columns."""
    last, after = ("decode", row, position - 1), ("decode", row, position)
    (found,) = excused(position, (last, NEAR), row=row)
    assert f"position {length + position - 1}:" in found.routing
    assert not excused(position, (after, NEAR), row=row)[0].excused
    assert excused(position, (last, NEAR), (after, FAR), row=row)[0].excused


def test_only_choices_of_its_own_row_count() -> None:
    assert not excused(1, (("prefill", 0, 2), NEAR))[0].excused
    assert excused(1, (("prefill", 1, 0), NEAR), (("prefill", 0, 2), FAR))[0].excused


@pytest.mark.parametrize("far", [0, 1, 2])
def test_one_choice_before_it_that_is_no_near_tie_spoils_it(far: int) -> None:
    chosen = [(("prefill", 1, column), FAR if column == far else NEAR) for column in range(WIDTH)]
    assert not excused(1, *chosen)[0].excused


@pytest.mark.parametrize("position", [0, 2])
def test_with_the_baseline_s_experts_ours_prefers_its_token_or_one_within_twice_the_noise(position: int) -> None:
    near = (("prefill", 1, 0), NEAR)
    second = np.array([0.0, 9.0, 0.0, 0.0])
    assert excused(position, near, said=second)[0].excused
    assert not excused(position, near, said=second, best=np.nextafter(LOGITS[0], 2))[0].excused
    assert excused(position, near, best=np.nextafter(LOGITS[0], 2))[0].excused


def test_with_the_baseline_s_experts_ours_may_prefer_a_neighbour_in_the_dtype() -> None:
    """However exact the baseline is: at 1.5 a step of bfloat16 is 2^-7."""
    for margin, expected in ((2.0**-7, True), (2.0**-7 + 2.0**-40, False)):
        ours, exact = trace(), trace()
        ours.routing["prefill"].wanted[0, 1, 0] = NEAR
        exact.routing["prefill"].logits[...] = [1.0, 1.0, 0.0, -1.0]
        exact.prefill_logits[1, -1, 1] = 1.5 - margin
        ours.prefill_logits[1, -1, 1] = 9.0
        (found,) = text.excused_by_routing(
            [Divergence(1, 0, 0, 1, (9.0, 0.0), 1e-6)], ours, exact, exact, torch.bfloat16
        )
        assert found.excused is expected


def test_every_text_comes_back_and_one_that_is_excused_as_it_is() -> None:
    ours, baseline, reference = trace(), trace(), trace(NOISE)
    ours.routing["prefill"].wanted[0, 1, 0] = NEAR
    tie = Divergence(1, 1, 0, 1, (1.0, 1.0), 1e-6)
    found = [tie, Divergence(0, 1, 0, 1, (9.0, 0.0), 1e-6), Divergence(1, 2, 0, 1, (9.0, 0.0), 1e-6)]
    after = text.excused_by_routing(found, ours, baseline, reference, torch.float64)
    assert after[:2] == found[:2]
    assert [bool(each.routing) for each in after] == [False, False, True]
