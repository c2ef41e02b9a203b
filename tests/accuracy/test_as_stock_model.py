"""Whatever is done with the stock model can be done with this one, and gives the same; or is refused by name.

The counterpart of transformers' own test classes for causal models: what they do is in ``stock_scenarios.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import UnsupportedError
from tests.accuracy.stock_scenarios import SCENARIOS
from tests.unit.small import small_config, small_stock, stock_weights

LAYERS, WIDTH = 3, 256
EPSILON = torch.finfo(torch.float32).eps
ALLOWED = 8 * LAYERS * WIDTH**0.5 * EPSILON
"""Of the largest value: products of WIDTH terms round by √WIDTH · ε, and there are fewer than eight in a layer."""

PRESETS = {"none": Optimizations.none(), "all": Optimizations.all()}


@cache
def stock_model(tied: bool, device: str) -> Any:
    return small_stock(small_config(tie_word_embeddings=tied)).to(device)


@cache
def own_model(tied: bool, device: str, preset: str) -> Any:
    stock = stock_model(tied, "cpu")
    model = Qwen2ForCausalLM.from_state_dict(
        stock.config, stock_weights(stock), device=device, optimizations=PRESETS[preset]
    )
    return model.eval()


def differences(ours: Any, stock: Any, where: str = "result") -> Iterator[str]:
    """What differs: names and numbers at all, floats by more than rounding."""
    if isinstance(stock, torch.Tensor) and isinstance(ours, torch.Tensor):
        if ours.shape != stock.shape:
            yield f"{where}: shape {tuple(ours.shape)}, stock {tuple(stock.shape)}"
            return
        one, other = ours.detach().cpu().double(), stock.detach().cpu().double()
        finite = other.isfinite()
        if not torch.equal(one[~finite], other[~finite]):
            yield f"{where}: infinities elsewhere"
        error, largest = (one - other)[finite].abs(), other[finite].abs()
        if error.numel() and not error.max() <= ALLOWED * largest.max():
            yield f"{where}: off by {error.max():.3g} of {largest.max():.3g}"
    elif isinstance(stock, list | tuple) and isinstance(ours, list | tuple) and len(ours) == len(stock):
        for place, (one, other) in enumerate(zip(ours, stock, strict=True)):
            yield from differences(one, other, f"{where}[{place}]")
    elif ours != stock:
        yield f"{where}: {ours}, stock {stock}"


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.option.device)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_as_stock(name: str, preset: str, device: str) -> None:
    scenario = SCENARIOS[name]
    if scenario.from_v5 and IS_V4:
        pytest.skip("transformers 4.37.0 does not offer it")
    tied = len(name) % 2 == 0  # half of them with one table for embedding and head
    ours = own_model(tied, device, preset)
    with torch.no_grad():
        if scenario.refused and (preset == "all" or not scenario.by_fixed_cache):
            with pytest.raises((UnsupportedError, ValueError, TypeError), match=re.escape(scenario.refused)):
                scenario.run(ours)
            return
        found = list(differences(scenario.run(ours), scenario.run(stock_model(tied, device))))
    assert not found, "\n".join(found)


def test_a_difference_is_seen() -> None:
    """By the smallest amount that must be, and not by the largest that must not."""
    right = [torch.tensor([1.0, -2.0]), "name", [3, float("inf")]]
    for factor, seen in ((0.9, False), (1.1, True)):
        shifted = [right[0].double() + torch.tensor([factor * ALLOWED * 2.0, 0.0]).double(), *right[1:]]
        assert bool(list(differences(shifted, right))) == seen
    for wrong in ([right[0][:1], *right[1:]], [right[0], "other", right[2]], [right[0], "name", [3]], right[:2]):
        assert list(differences(wrong, right))
    infinite = torch.tensor([1.0, torch.inf])
    assert list(differences(torch.tensor([1.0, torch.nan]), infinite))
    assert list(differences(torch.tensor([torch.nan, torch.inf]), infinite))
    assert not list(differences(infinite, infinite.clone()))
