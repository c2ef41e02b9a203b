"""Random numbers: seeds, generators, saved states, and independence from the CPU's generator."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.emulator.eager import random

DRAWS = {
    "randn": lambda on="npu", **g: torch.randn(5, device=on, **g),
    "rand_like": lambda on="npu": torch.rand_like(torch.empty(5, device=on)),
    "randint": lambda on="npu", **g: torch.randint(0, 1000, (5,), device=on, **g),
    "randperm": lambda on="npu", **g: torch.randperm(50, device=on, **g),
    "normal_": lambda on="npu", **g: torch.empty(5, device=on).normal_(**g),
    "uniform_": lambda on="npu", **g: torch.empty(5, device=on).uniform_(**g),
    "bernoulli": lambda on="npu", **g: torch.bernoulli(torch.full((50,), 0.5, device=on), **g),
    "multinomial": lambda on="npu", **g: torch.multinomial(torch.ones(100, device=on), 20, **g),
    "exponential_": lambda on="npu", **g: torch.empty(5, device=on).exponential_(**g),
    "dropout": lambda on="npu": torch.nn.functional.dropout(torch.ones(50, device=on), 0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_seeds_repeat_and_draws_differ(name):
    draw = DRAWS[name]
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(second, first)
    torch.npu.manual_seed(6)
    assert not torch.equal(draw(), first)


@pytest.mark.parametrize("name", [name for name in DRAWS if name not in ("dropout", "rand_like")])
def test_generators_of_the_npu(name):
    generator = torch.Generator("npu").manual_seed(1)
    before = torch.npu.get_rng_state()
    first = DRAWS[name](generator=generator)
    assert not torch.equal(DRAWS[name](generator=generator), first)
    assert torch.equal(torch.npu.get_rng_state(), before)
    generator.manual_seed(1)
    assert generator.initial_seed() == 1
    assert torch.equal(DRAWS[name](generator=generator), first)


def test_the_first_draw_is_the_cpu_s():
    torch.manual_seed(7)
    expected = torch.randn(4)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(4, device="npu").cpu(), expected)


@pytest.mark.parametrize("name", DRAWS)
def test_the_cpu_s_generator_stands_still(name):
    state = torch.get_rng_state()
    DRAWS[name]()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_that_fails_leaves_the_cpu_s_generator_as_it_was():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), random.as_default(torch.Generator().manual_seed(8)):
        torch.rand(3).view(4)
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_states():
    state = torch.npu.get_rng_state()
    first = torch.rand(3, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="npu"), first)
    with torch.random.fork_rng(device_type="npu"):
        torch.npu.manual_seed(99)
        torch.rand(3, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="npu"), first)


def test_cards_have_generators_of_their_own():
    torch.npu.manual_seed_all(3)
    first = torch.rand(3, device="npu:0")
    assert torch.equal(torch.rand(3, device="npu:1").cpu(), first.cpu())
    torch.npu.manual_seed(4)
    state = torch.npu.get_rng_state(1)
    torch.rand(3, device="npu:0")
    assert torch.equal(torch.npu.get_rng_state(1), state)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_of_the_card_of_its_tensor(name):
    """Not of the current one."""
    before = torch.npu.get_rng_state_all()
    DRAWS[name]("npu:1")
    moved = [not torch.equal(*states) for states in zip(before, torch.npu.get_rng_state_all(), strict=True)]
    assert moved == [number == 1 for number in range(len(before))]


def test_a_draw_moves_the_offset():
    generator = torch.Generator("npu").manual_seed(2)
    seeds = {random.draw(generator).initial_seed() for _ in range(100)}
    assert len(seeds) == 100
