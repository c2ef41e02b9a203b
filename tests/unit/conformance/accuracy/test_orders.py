"""What rank 0 tells the other ranks of a comparison, and that they do it: a thread per rank."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qwen2_npu import Optimizations
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import locate_error, orders, teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.configs import random_state_dict, small_config
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.orders import CALLS, END, Orders, follow
from qwen2_npu.conformance.accuracy.pair import Pair
from qwen2_npu.conformance.accuracy.streamed_pair import StreamedPair
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.launch import RankGroup
from tests.unit import small
from tests.unit.parallel.virtual import sharded, virtual_ranks

SHAPE, DECODE_STEPS = "qwen2-0.5b", 2
BATCH = Batch.of([[5, 6, 7], [8]])

Damage = Callable[[Any, Ranks], None]


PATIENCE = 10
"""Seconds after which a rank that is told nothing fails its test: in a real job ``parallel.monitor`` ends it."""


@pytest.fixture(autouse=True)
def nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: dict[int, int] = {}

    def sleep(seconds: float) -> None:
        thread = threading.get_ident()
        waited[thread] = waited.get(thread, 0) + 1
        assert waited[thread] * orders.POLL < PATIENCE, "no order came"
        own(seconds)

    own = time.sleep
    monkeypatch.setattr(orders, "time", SimpleNamespace(sleep=sleep))


def groups(count: int) -> list[RankGroup]:
    store = dist.HashStore()
    return [RankGroup(rank, count, torch.device("cpu"), store) for rank in range(count)]


def led(pair: Pair, state: Any, question: Callable[[Pair], Any], damage: Damage = lambda model, ranks: None) -> Any:
    """What ``question`` finds on rank 0 of two; the other one follows.

    Args:
        damage: what happens to every new part of the model.
    """
    pair.traces("ragged")  # before there are threads: the float64 reference changes torch's default dtype
    own = pair.build
    both = groups(2)

    def rank(ranks: Ranks) -> Any:
        def build(optimizations: Optimizations) -> Any:
            model = sharded(pair.config, state, ranks, optimizations, dtype=pair.dtype)
            damage(model, ranks)
            return model

        said = Orders(both[ranks.shard.rank])
        if ranks.shard.rank:
            return follow(said, build)
        pair.build = build
        pair.lead(said)
        found = question(pair)
        said.tell(END, passed=False)
        return found

    try:
        with virtual_ranks(2) as run:
            found, passed = run(rank)
    finally:
        pair.build, pair.orders = own, None
    assert passed is False, "what rank 0 said at the end"
    return found


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state_dict(small_config(SHAPE), seed=0, dtype=torch.float32)


@pytest.fixture(scope="module", params=[ModelPair, StreamedPair])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.param.of_shape(SHAPE, decode_steps=DECODE_STEPS)
    return found


# ---- orders ----------------------------------------------------------------------------------------------------------
def test_what_is_told_arrives_in_its_order() -> None:
    first, other = (Orders(group) for group in groups(2))
    forced = np.array([[1, 2], [3, 4]])
    first.tell("run", batch=BATCH, forced=forced, hidden=True, decode_steps=2)
    first.tell("token_losses", windows=[[1, 2, 3], [4]])
    first.tell("captures", batch=BATCH, forced=forced[:, :0])
    what, arguments = other.next()
    assert what == "run"
    assert torch.equal(arguments["batch"].input_ids, BATCH.input_ids)
    assert torch.equal(arguments["batch"].attention_mask, BATCH.attention_mask)
    assert np.array_equal(arguments["forced"], forced)
    assert arguments["forced"].dtype == np.int64
    assert (arguments["hidden"], arguments["decode_steps"]) == (True, 2)
    assert other.next() == ("token_losses", {"windows": [[1, 2, 3], [4]]})
    assert other.next()[1]["forced"].shape == (2, 0)


def test_a_second_comparison_has_orders_of_its_own() -> None:
    both = groups(2)
    Orders(both[0]).tell("build", steps=[])
    Orders(both[1])
    first, other = (Orders(group) for group in both)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(follow, other, lambda optimizations: pytest.fail("an order of the first one"))
        time.sleep(2 * orders.POLL)
        assert not waiting.done()
        first.tell(END, passed=True)
        assert waiting.result(5) is True


def test_an_order_is_waited_for_beyond_the_timeout() -> None:
    """The store's own waits end with an error, and so do collectives."""
    both = groups(2)
    both[0].store.set_timeout(timedelta(milliseconds=1))
    first, other = (Orders(group) for group in both)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.next)
        time.sleep(3 * orders.POLL)
        assert not waiting.done()
        first.tell("build", steps=["fixed_kv_cache"])
        assert waiting.result(5) == ("build", {"steps": ["fixed_kv_cache"]})


@pytest.mark.parametrize(
    ("ranks", "local", "here"), [(None, None, 1), (4, None, 4), (4, 2, 2), (4, 4, 4), (2, 8, 2), (1, 1, 1)]
)
def test_the_ranks_of_this_host_are_those_that_its_launcher_started(
    ranks: int | None, local: int | None, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All where it does not say; never more than there are in the group."""
    group = None if ranks is None else SimpleNamespace(world_size=ranks)
    monkeypatch.setattr(orders.launch, "current", lambda: group)
    monkeypatch.setattr(orders.launch, "launched", lambda: None if ranks is None else SimpleNamespace(local_size=local))
    assert orders.rank_count() == (ranks or 1)
    assert orders.ranks_of_host() == here


def test_a_model_is_gone_before_the_next_one_is_built() -> None:
    """There is memory for one."""
    first, other = (Orders(group) for group in groups(2))
    for steps in ([], ["fixed_kv_cache"]):
        first.tell("build", steps=steps)
    first.tell(END, passed=True)
    built: list[weakref.ref[Any]] = []

    def build(optimizations: Optimizations) -> Any:
        assert not built or built[-1]() is None
        model = torch.nn.Module()
        built.append(weakref.ref(model))
        return model

    assert follow(other, build)
    assert len(built) == 2


def test_only_what_others_can_do_is_asked() -> None:
    assert set(CALLS) == {"compile_model", "run", "captures", "token_losses", "greedy"}


# ---- the pair --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["fixed_kv_cache", "mm_all_reduce"])
def test_ranks_pass_together(pair: Pair, state: Any, step: str) -> None:
    optimizations = Optimizations.up_to(step)
    assert led(pair, state, lambda pair: pair.failure(optimizations, "ragged")) == ""


def test_perplexity_and_texts() -> None:
    source = open_checkpoint(tiny.path())
    state = {name: tensor.float() for name, tensor in source.tensors()}
    pair = ModelPair.of_checkpoint(dtype="float32", decode_steps=1)

    def asked(pair: Pair) -> Any:
        model = pair.build(Optimizations.all())
        return pair.perplexity(model), pair.samples(model, tiny.prompts()[:2], max_new_tokens=3)

    (perplexity, samples), (alone, texts) = led(pair, state, asked), asked(pair)
    assert perplexity.passed
    assert perplexity.optimised == pytest.approx(alone.optimised, rel=1e-5)
    assert samples == texts


def damaged(name: str) -> Damage:
    """A parameter of the second rank's part."""

    def damage(model: Any, ranks: Ranks) -> None:
        parameters = dict(model.named_parameters())
        if name in parameters and ranks.shard.rank:
            parameters[name].data.mul_(1.01)

    return damage


@pytest.mark.parametrize(
    ("step", "parameter", "said"),
    [
        ("", "model.layers.1.self_attn.o_proj.weight", "with every optimisation off, layer 1, o_proj (linear, all-red"),
        pytest.param(
            "fused_qkv",
            "model.layers.1.self_attn.qkv_proj.bias",
            "step fused_qkv, layer 1, q_proj (linear): ",
            marks=pytest.mark.slow,
        ),
        ("fused_gate_up", "model.layers.0.mlp.gate_up_proj.weight", "step fused_gate_up, layer 0, gate_proj (linear)"),
    ],
)
def test_the_part_of_one_rank_is_followed_to_step_layer_and_operator(
    pair: Pair, state: Any, step: str, parameter: str, said: str
) -> None:
    optimizations = Optimizations.of([step] if step else [])
    found = led(pair, state, lambda pair: str(pair.explain(optimizations, "one")), damaged(parameter))
    assert found.startswith(said), found


@pytest.mark.parametrize(("size", "kv_heads", "vocabulary"), [(2, 2, 199), (4, 2, 200)])
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_what_ranks_capture_is_the_whole(
    size: int, kv_heads: int, vocabulary: int, optimizations: Optimizations
) -> None:
    """Also where ranks share a kv head, and where the vocabulary is not cut."""
    config = small.small_config(num_hidden_layers=1, num_key_value_heads=kv_heads, vocab_size=vocabulary)
    state = small.stock_weights(small.small_stock(config))
    forced = np.array([[1], [2]])

    def captured(ranks: Ranks) -> list[locate_error.PassRecorder]:
        return locate_error.captures(sharded(config, state, ranks, optimizations), BATCH, forced)

    expected = captured(Ranks())
    with virtual_ranks(size) as run:
        for found in run(captured):
            for ours, whole in zip(found, expected, strict=True):
                assert [point.where for point in ours.points] == [point.where for point in whole.points]
                for point, same in zip(ours.points, whole.points, strict=True):
                    assert (point.values.shape, point.heads) == (same.values.shape, same.heads), point.where
                    np.testing.assert_allclose(point.values, same.values, rtol=1e-4, atol=1e-4, err_msg=point.where)


def test_alone_nobody_is_told() -> None:
    assert Orders.of_ranks() is None
    assert (orders.rank_count(), orders.ranks_of_host()) == (1, 1)
    pair = ModelPair.of_shape(SHAPE, decode_steps=1)
    model = pair.build(Optimizations.none())
    trace = pair.ask(teacher_forcing.run, model, batch=pair.batch("one"))
    assert np.isfinite(trace.prefill_logits).all()
