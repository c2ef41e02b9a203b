"""The message of two texts that part."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu import Qwen2ForCausalLM
from tests.unit.small import small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens

TEXT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])


def changed(*places: tuple[int, int]) -> torch.Tensor:
    found = TEXT.clone()
    for place in places:
        found[place] = 99
    return found


def test_the_same_tokens_pass() -> None:
    assert_same_tokens(TEXT.clone(), TEXT)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 0)], "row 0, position 0: token 99, expected 1; 1 of 3 rows differ"),
        ([(2, 3)], "row 2, position 3: token 99, expected 12; 1 of 3 rows differ"),
        ([(2, 0), (1, 3), (1, 1)], "row 1, position 1: token 99, expected 6; 2 of 3 rows differ"),
    ],
)
def test_the_first_difference_is_named(places: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(AssertionError) as raised:
        assert_same_tokens(changed(*places), TEXT)
    assert str(raised.value) == message


@pytest.mark.parametrize("found", [TEXT[:, :3], TEXT[:2], torch.cat((TEXT, TEXT), dim=1)])
def test_another_length_is_a_difference(found: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match=r"tokens \[\d, \d\], expected \[3, 4\]"):
        assert_same_tokens(found, TEXT)


def test_it_says_whose_tokens_they_are() -> None:
    with pytest.raises(AssertionError, match=r"^rank 1: row 0, position 2: token 99, expected 3; 1 of 3 rows differ$"):
        assert_same_tokens(changed((0, 2)), TEXT, where="rank 1")
    with pytest.raises(AssertionError, match=r"^rank 1: tokens \[2, 4\], expected \[3, 4\]$"):
        assert_same_tokens(TEXT[:2], TEXT, where="rank 1")


@pytest.mark.parametrize("padded", [0, 2])
def test_the_margin_is_what_the_model_knew_there(padded: int) -> None:
    config = small_config(num_hidden_layers=1)
    model = Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config))).eval()
    model.compiled_steps = {"decode": None}  # whatever graphs there were
    mask = torch.ones(1, 5, dtype=torch.int64)
    mask[0, :padded] = 0
    call = {
        "input_ids": torch.randint(1, 199, (1, 5), generator=torch.Generator().manual_seed(3)),
        "attention_mask": mask,
    }
    expected = torch.cat((call["input_ids"], torch.tensor([[17, 18]])), dim=1)
    found = expected.clone()
    found[0, 6] = 21
    live = expected[:, padded:6]
    with torch.no_grad():
        logits = model(input_ids=live, attention_mask=torch.ones_like(live)).logits[0, -1]
    with pytest.raises(AssertionError) as raised:
        assert_same_tokens(found, expected, model, call)
    margin = float(str(raised.value).split("margin ")[1].split(";")[0])
    assert margin == pytest.approx(float(logits[18] - logits[21]), rel=1e-2, abs=1e-6)
    assert str(raised.value).startswith("row 0, position 6: token 21, expected 18, margin ")
