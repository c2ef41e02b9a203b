from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.emulator.ge.building import compute, ge

Tensor = torch.Tensor
COUNT = 4000
SIGMA = COUNT**-0.5  # of the mean of COUNT numbers of unit variance


def uniform(seed: int = 1, offset: int = 0) -> Tensor:
    return drawn(ge.StatelessRandomUniformV2, seed, offset)


def normal(seed: int = 1, offset: int = 0) -> Tensor:
    return drawn(ge.StatelessRandomNormalV2, seed, offset)


def drawn(operator: Any, seed: int, offset: int) -> Tensor:
    def make() -> Any:
        key = ge.Cast(ge.Const([seed], dtype=9), dst_type=10)
        counter = ge.Cast(ge.Const([0, offset], dtype=9), dst_type=10)
        return operator([COUNT], key, counter, ge.Const(1, dtype=3), dtype=0)

    return compute(make)[0]


def bernoulli(seed: int = 1, offset: int = 0) -> Tensor:
    def make() -> Any:
        return ge.StatelessBernoulli([COUNT], 0.25, ge.Const(seed, dtype=9), ge.Const(offset, dtype=9), dtype=0)

    return compute(make)[0]


def multinomial(seed: int = 1, offset: int = 0) -> Tensor:
    def make(weights: Any) -> Any:
        return ge.MultinomialWithReplacement(
            weights, ge.Const(seed, dtype=9), ge.Const(offset, dtype=9), numsamples=COUNT
        )

    return compute(make, torch.tensor([1.0, 0.0, 3.0]))[0]


def dropout(seed: int = 1, offset: int = 0) -> Tensor:
    def make(x: Any) -> Any:
        keep = ge.Const(0.25, dtype=0)
        mask = ge.StatelessDropOutGenMask(
            [COUNT], keep, ge.Const(seed, dtype=9), ge.Const(0, dtype=9), ge.Const([0, offset], dtype=9)
        )
        return ge.DropOutDoMask(x, mask, keep)

    return compute(make, torch.ones(COUNT))[0]


TESTED = {
    "StatelessRandomUniformV2": uniform,
    "StatelessRandomNormalV2": normal,
    "StatelessBernoulli": bernoulli,
    "MultinomialWithReplacement": multinomial,
    "StatelessDropOutGenMask": dropout,
    "DropOutDoMask": dropout,
}
"""Operator -> what draws with it."""


@pytest.mark.parametrize("draw", [*dict.fromkeys(TESTED.values())], ids=lambda f: f.__name__)
def test_numbers_follow_from_seed_and_offset(draw: Any) -> None:
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=2))
    assert not torch.equal(draw(), draw(offset=8))


def test_uniform_moments() -> None:
    x = uniform()
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(x.mean().item() - 0.5) < 5 * SIGMA * 12**-0.5
    assert abs(x.var().item() - 1 / 12) < 5 * SIGMA / 12


def test_normal_moments() -> None:
    x = normal()
    assert abs(x.mean().item()) < 5 * SIGMA
    assert abs(x.var().item() - 1) < 5 * SIGMA * 2**0.5


def test_bernoulli_rate() -> None:
    x = bernoulli()
    assert set(x.tolist()) == {0.0, 1.0}
    assert abs(x.mean().item() - 0.25) < 5 * SIGMA * 0.433


def test_multinomial_rates() -> None:
    x = multinomial()
    assert set(x.tolist()) == {0, 2}
    assert abs((x == 0).double().mean().item() - 0.25) < 5 * SIGMA * 0.433


def test_dropout_scales_what_it_keeps() -> None:
    x = dropout()
    assert set(x.tolist()) == {0.0, 4.0}
    assert abs(x.mean().item() - 1) < 5 * SIGMA * 3**0.5
