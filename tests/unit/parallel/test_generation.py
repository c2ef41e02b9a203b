"""One call of generate on all ranks. Two real processes make such calls in tests/accuracy/parallel_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.cache import FixedKVCache
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel import generation
from qwen2_npu.parallel.collectives import ALONE, Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.parallel.virtual import sharded, virtual_ranks
from tests.unit.small import small_config, small_stock, stock_weights
from tests.unit.test_cache import shape
from tests.unit.tokens import assert_same_tokens

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 5, 7]])


class SecondRank(Ranks):
    """What is broadcast to it is the state of a generator with another seed."""

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.Generator().manual_seed(41).get_state()


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the ranks are asked to agree on, call by call."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(generation, "agree", lambda facts, way_out: found.append(facts))
    return found


def test_random_numbers_are_those_of_rank_0(facts: list[dict[str, Any]]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        generation.start(SecondRank(Shard(1, 2)), {"input_ids": IDS}, CPU)
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(41)))


def test_random_numbers_are_those_of_the_device_that_samples(
    facts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own are left alone; the state goes through the device, since the group is one of cards."""
    moved, taken = [], []
    own = SimpleNamespace(to=lambda device: moved.append(device) or "on the card")
    sent = SimpleNamespace(cpu=lambda: "rank 0's, on the host")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: own)
    monkeypatch.setattr(torch.cuda, "set_rng_state", taken.append)
    ranks = SimpleNamespace(size=2, from_first=lambda state: sent if state == "on the card" else state)
    before = torch.get_rng_state()
    generation.start(ranks, {}, torch.device("cuda:1"))  # type: ignore[arg-type]
    assert (moved, taken) == ([torch.device("cuda:1")], ["rank 0's, on the host"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": IDS + 1},
        {"input_ids": IDS.to(torch.int32)},
        {"input_ids": IDS.view(torch.float64)},
        {"input_ids": IDS.T},
        {"do_sample": True},
        {"generation_config": GenerationConfig(top_k=3)},
        {"eos_token_id": [7, 8]},
        {"stopping_criteria": StoppingCriteriaList()},
        {"sequence_bias": {(3,): 2.0}},
        {"bad_words_ids": [[3], [5]]},
    ],
    ids=[
        *("ids", "dtype", "dtype of the same bytes", "shape", "an option more", "configuration", "a list"),
        *("fewer criteria", "a value by name", "a list in a list"),
    ],
)
def test_other_arguments_are_other_facts(other: dict[str, Any], facts: list[dict[str, Any]]) -> None:
    ranks = SecondRank(Shard(1, 2))

    def call(**more: Any) -> dict[str, Any]:
        return {
            "input_ids": IDS.clone(),
            "generation_config": GenerationConfig(top_k=2),
            "eos_token_id": [7, 9],
            "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(9)]),  # each rank has an object of its own
            "sequence_bias": {(3,): 1.0},
            "bad_words_ids": [[3], [4]],
            **more,
        }

    for more in ({}, {"streamer": object()}, other):
        generation.start(ranks, call(**more), CPU)
    assert facts[0] == facts[1], "equal arguments, and a streamer that one rank has for itself"
    assert facts[2] != facts[0]


@pytest.mark.parametrize("name", [None, "inputs", "input_ids"], ids=["by position", "inputs", "input_ids"])
def test_all_that_a_call_is_given_is_compared_however_it_is_passed(
    name: str | None, facts: list[dict[str, Any]]
) -> None:
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=1))
    model.ranks = SecondRank(Shard(1, 2))
    by_position = [IDS] if name is None else []
    by_name: dict[str, Any] = {} if name is None else {name: IDS}
    with torch.random.fork_rng(devices=[]), pytest.raises(UnsupportedError, match="max_time"):
        model.generate(*by_position, **by_name, max_time=1.0, past_key_values=model.allocate_cache(1, 8))
    assert [set(each) for each in facts] == [{name or "inputs", "max_time", CACHE_NAME}]


def test_alone_nothing_is_agreed_on_and_no_state_changes(facts: list[dict[str, Any]]) -> None:
    before = torch.get_rng_state()
    generation.start(ALONE, {"input_ids": IDS}, CPU)
    generation.check(ALONE, GenerationConfig(max_time=1.0))
    assert facts == []
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("where", ["argument", "configuration", "the model's own"])
def test_a_limit_of_time_is_refused_wherever_it_is_from(where: str, facts: list[dict[str, Any]]) -> None:
    config = small_config()
    model = sharded(config, stock_weights(small_stock(config)), ALONE)
    model.ranks = SecondRank(Shard(1, 2))
    given: dict[str, Any] = {}
    if where == "argument":
        given["max_time"] = 2.5
    elif where == "configuration":
        given["generation_config"] = GenerationConfig(max_time=2.5, pad_token_id=0)
    else:
        model.generation_config.max_time = 2.5
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(
            UnsupportedError,
            match=r"^max_time=2\.5: each of the 2 ranks would stop by its own clock; use max_new_tokens$",
        ),
    ):
        model.generate(IDS, max_new_tokens=2, **given)


def test_caches_that_would_grow_otherwise_are_other_facts(facts: list[dict[str, Any]]) -> None:
    caches = [FixedKVCache(shape(capacity=capacity)) for capacity in (128, 128, 256, 128, 128)]
    for cache, lengths in zip(caches, ([4, 4, 4], [4, 4, 4], [4, 4, 4], [4, 3, 4], [4, 4, 4]), strict=True):
        with cache.step(lengths, 4):
            pass
    caches[4].padding = torch.zeros(3, 4, dtype=torch.bool)
    for cache in caches:
        generation.start(SecondRank(Shard(1, 2)), {"past_key_values": cache}, CPU)
    assert facts[0] == facts[1]
    assert all(one != facts[0] for one in facts[2:])


def test_on_all_ranks_a_cache_grows_and_what_is_too_long_is_cut() -> None:
    config = small_config(max_position_embeddings=160)
    stock = small_stock(config)
    ids = torch.randint(1, 199, (1, 120), generator=torch.Generator().manual_seed(2))

    def run(ranks: Ranks) -> tuple[torch.Tensor, int]:
        model = sharded(config, stock_weights(stock), ranks)
        cache = model.allocate_cache(1, 100)
        with torch.no_grad():
            model(ids[:, :100], past_key_values=cache)
        answer = model.generate(ids, past_key_values=cache, max_new_tokens=32768, do_sample=False)
        return answer, cache.shape.capacity

    with virtual_ranks(2) as on_all, pytest.warns(UserWarning, match="41 are generated at most"):
        answers = on_all(run)
    expected = stock.generate(ids, max_new_tokens=41, do_sample=False)
    for rank, (answer, capacity) in enumerate(answers):
        assert_same_tokens(answer, expected, stock, where=f"rank {rank}")
        assert capacity == 256
