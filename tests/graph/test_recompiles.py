"""Exact graph counts: one prefill per (batch, prompt bucket), one decode per (batch, cache bucket), nothing else."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, compile_model
from qwen2_npu.models import backbone, layers
from tests.graph.counting import GraphCounter
from tests.graph.support import build, generate, prompt
from tests.unit.tokens import assert_same_tokens

MASKED = "flash_attention"
"""The step whose graphs have another input, a mask; the last one is in the fast lane, and what is between changes what
is inside of the graphs."""

STEPS = [pytest.param(step, marks=() if step == LADDER[-1] else pytest.mark.slow) for step in LADDER if step != MASKED]
STEPS.append(pytest.param(MASKED, marks=(pytest.mark.slow, pytest.mark.slow_in_ci)))


@pytest.mark.parametrize("step", STEPS)
def test_two_graphs_serve_many_steps_prompts_and_calls(step: str, device: str) -> None:
    model = build(device, Optimizations.up_to(step))
    calls = [prompt(device, 3, 9), prompt(device, 3, 9, ragged=True), prompt(device, 3, 12)]
    lengths = (66, 20, 20)
    eager = build(device, Optimizations.up_to(step))
    expected = [generate(eager, call, length) for call, length in zip(calls, lengths, strict=True)]
    with GraphCounter() as counter:
        compile_model(model, "torchair")
        for done, (call, length, tokens) in enumerate(zip(calls, lengths, expected, strict=True)):
            assert_same_tokens(generate(model, call, length), tokens, eager, call)
            assert counter.compiled == 2, counter.describe()
            # Every step ran in a graph: none fell back to eager.
            assert counter.runs == sum(lengths[: done + 1]), counter.describe()
        # Another prompt bucket is one more prefill; another batch one of each.
        for batch, tokens, graphs in ((3, 30, 3), (2, 30, 5), (2, 30, 5)):
            generate(model, prompt(device, batch, tokens), 3)
            assert counter.compiled == graphs, counter.describe()
        assert counter.backends == 1, counter.describe()


FEW = 2
"""dynamo's own limit is 8 graphs; reaching it takes seconds, and a lower one is as good."""


def test_more_buckets_than_dynamo_would_allow(device: str) -> None:
    """Past dynamo's limit it would run eager without a word."""
    model = build(device)
    calls = [prompt(device, 1, 8 * count - 1) for count in range(1, FEW + 2)]
    eager = build(device)
    expected = [generate(eager, call, 2) for call in calls]
    with GraphCounter() as counter, torch._dynamo.config.patch(recompile_limit=FEW):
        compile_model(model, "torchair")
        for call, tokens in zip(calls, expected, strict=True):
            assert_same_tokens(generate(model, call, 2), tokens, eager, call)
        assert counter.compiled == len(calls) + 1, counter.describe()  # and one for decode
        assert counter.runs == 2 * len(calls), counter.describe()


@pytest.mark.slow
@pytest.mark.parametrize("step", ["flash_attention", LADDER[-1]])
def test_a_longer_rotary_table_needs_new_graphs(step: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with more positions than its table has at first: graphs are for the table there is, none for another."""
    for module in (layers, backbone):
        monkeypatch.setattr(module, "TABLE_ROWS", 64)
    short, long = (prompt(device, 2, 9), 4), (prompt(device, 2, 127), 5)
    calls = ((short, 2), (long, 4), (short, 6), (long, 6), (short, 6))
    eager = build(device, Optimizations.up_to(step))
    expected = {tokens: generate(eager, call, tokens) for call, tokens in (short, long)}
    rows = []
    with GraphCounter() as counter:
        model = compile_model(build(device, Optimizations.up_to(step)), "torchair")
        for (call, tokens), graphs in calls:
            assert_same_tokens(generate(model, call, tokens), expected[tokens], eager, call)
            assert counter.compiled == graphs, counter.describe()
            rows.append(len(model.model.rotary.cos))
    assert rows == [128, 256, 256, 256, 256]


def test_the_caches_are_updated_where_they_are(device: str) -> None:
    model = compile_model(build(device), "torchair")
    call = prompt(device, 2, 9)
    with GraphCounter():
        generate(model, call, 4)
        cache = model._pool.idle
        assert cache is not None
        addresses = [tensor.data_ptr() for tensor in cache.key_cache + cache.value_cache]
        generate(model, call, 4)
        assert model._pool.idle is cache
        assert [tensor.data_ptr() for tensor in cache.key_cache + cache.value_cache] == addresses
