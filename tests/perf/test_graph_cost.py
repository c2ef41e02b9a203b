"""The cost of every documented graph, as counts that are the same on any machine.

The ladder's graphs at batch 4 are held against their baselines in tests/graph/test_census.py; here are the batch
sweeps, and the guide's story told in counts: what each step saves, it saves in the lowered graph.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from operator import eq, gt, le, lt
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.baselines import BATCH, GRAPH_SIZES, DocumentedGraph
from qwen2_npu.conformance.graph.census import Census
from qwen2_npu.conformance.graph.cost import ATTENTION, PRODUCTS, Cost
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import LADDER, ORIGINAL, Phase

SWEEP = [graph for graph in baselines.documented() if graph.batch != BATCH]

STORY: tuple[tuple[str, Phase, str, Callable[[int, int], bool]], ...] = (
    ("flash_attention", "prefill", "launches", lt),
    ("flash_attention", "prefill", "nbytes", lt),
    ("flash_attention", "decode", "launches", lt),
    ("flash_attention", "decode", "nbytes", lt),
    ("add_rms_norm", "prefill", "launches", lt),
    ("add_rms_norm", "prefill", "nbytes", lt),
    ("add_rms_norm", "decode", "launches", lt),
    ("last_token_logits", "prefill", "flops", lt),
    ("last_token_logits", "prefill", "nbytes", lt),
    ("last_token_logits", "decode", "nbytes", eq),
    ("fused_qkv", "prefill", "launches", lt),
    ("fused_qkv", "decode", "launches", lt),
    ("ifa_tiling", "decode", "cache_bytes", lt),
    ("ifa_tiling", "prefill", "nbytes", eq),
    ("fused_gate_up", "decode", "launches", le),
    ("swiglu", "prefill", "launches", lt),
    ("swiglu", "decode", "launches", lt),
    ("last_layer", "prefill", "flops", lt),
    ("last_layer", "prefill", "nbytes", lt),
    ("last_layer", "decode", "launches", eq),
    ("last_layer", "decode", "nbytes", eq),
    ("one_rotary", "prefill", "launches", eq),
    ("one_rotary", "prefill", "nbytes", eq),
    ("one_rotary", "decode", "launches", lt),
    ("one_rotary", "decode", "cache_bytes", eq),
    ("kv_scatter", "prefill", "launches", eq),
    ("kv_scatter", "prefill", "nbytes", eq),
    ("kv_scatter", "decode", "launches", lt),
    ("kv_scatter", "decode", "cache_bytes", eq),
)
"""Step, phase, what it changes, and how it compares with the step before. fixed_kv_cache is no such step: see below."""

FIXED_KV_CACHE: tuple[tuple[Phase, str, Callable[[int, int], bool]], ...] = (
    ("prefill", "launches", eq),
    ("prefill", "nbytes", gt),
    ("decode", "launches", gt),
    ("decode", "nbytes", gt),
    ("decode", "flops", gt),
)
"""What the first step changes against the stock graph: by counts it is no improvement.

The guide's decode gains from it in graph mode alone (7B 44 -> 41 ms, 72B 165 -> 65; single-op mode 52 -> 53 and
207 -> 206): shapes that stay the same from step to step spare graph mode its work per shape, and one step's graph
cannot show that. What it can show: the copies of the cache are gone, but until flash_attention all slots of the cache
are attended, not only the live ones, which costs more than the copies did.
"""


def census_of(size: str, phase: Phase, step: str, batch: int = BATCH) -> Census:
    """Of the full-size graph, from its baseline."""
    census = baselines.load(DocumentedGraph(size, phase, batch, step))
    assert census is not None, f"{size}-{phase}-b{batch}-{step} has no baseline"
    return census.of(SIZES[size].layers)


def cost_of(size: str, phase: Phase, step: str, batch: int = BATCH) -> Cost:
    """Of the full-size graph, from its baseline."""
    return census_of(size, phase, step, batch).cost


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="graphs are lowered by torch_npu's torchair")
@pytest.mark.parametrize("graph", SWEEP, ids=str)
def test_cost_is_the_baseline(graph: DocumentedGraph, pytestconfig: pytest.Config) -> None:
    found = graph.census()
    if pytestconfig.option.update_graphs:
        baselines.update(graph, found, pytestconfig.option.update_graphs)
    problem = baselines.verdict(graph, found)
    assert not problem, problem


@pytest.mark.parametrize(
    ("option", "recorded"), [("update_baselines", []), ("update_graphs", ["a reason"])], ids=["latencies", "graphs"]
)
def test_recording_latencies_records_no_graph(
    option: str, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(baselines, "update", lambda graph, census, reason: found.append(reason))
    monkeypatch.setattr(DocumentedGraph, "census", baselines.load)
    options: Any = {"update_baselines": None, "update_graphs": None, option: "a reason"}
    config: Any = SimpleNamespace(option=SimpleNamespace(**options))
    test_cost_is_the_baseline(SWEEP[0], config)
    assert found == recorded


@pytest.mark.parametrize("size", GRAPH_SIZES)
@pytest.mark.parametrize(
    ("step", "phase", "quantity", "relation"), STORY, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_each_step_saves_what_the_guide_says(
    size: str, step: str, phase: Phase, quantity: str, relation: Callable[[int, int], bool]
) -> None:
    before, after = (getattr(cost_of(size, phase, LADDER[LADDER.index(step) - back]), quantity) for back in (1, 0))
    assert relation(after, before), f"{step}: {quantity} {before} -> {after}, expected {relation.__name__}"


@pytest.mark.parametrize("name", GRAPH_SIZES)
def test_the_last_layer_of_a_prefill_costs_what_one_token_per_row_costs(name: str) -> None:
    """Its products but k and v, and its attention; the rest of the arithmetic is under a hundredth."""
    size, others = SIZES[name], baselines.PROMPT - 1
    before, after = (census_of(name, "prefill", step).costs for step in ("swiglu", "last_layer"))

    def saved(kinds: Iterable[str]) -> int:
        return sum(before.get(kind, Cost()).flops - after.get(kind, Cost()).flops for kind in kinds)

    query = size.heads * size.head_dim
    assert saved(PRODUCTS) == 2 * BATCH * others * size.hidden * (2 * query + 3 * size.intermediate)
    # Of the S(S + 1)/2 pairs of a causal prompt the last token has S.
    assert saved(ATTENTION) == 4 * BATCH * query * baselines.PROMPT * others // 2


@pytest.mark.parametrize("size", baselines.SWEEPS)
@pytest.mark.parametrize(
    ("phase", "quantity", "relation"), FIXED_KV_CACHE, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_fixed_kv_cache_saves_nothing_by_counts(
    size: str, phase: Phase, quantity: str, relation: Callable[[int, int], bool]
) -> None:
    before, after = (getattr(cost_of(size, phase, step), quantity) for step in (ORIGINAL, "fixed_kv_cache"))
    assert relation(after, before), f"{quantity} {before} -> {after}, expected {relation.__name__}"


@pytest.mark.parametrize("size", baselines.SWEEPS)
def test_a_fixed_kv_cache_trades_copies_for_slots_that_hold_nothing(size: str) -> None:
    """Why: the guide's own reason, copies, is met; what it costs is the whole cache in place of the live part."""
    before, after = (census_of(size, "decode", step).costs for step in (ORIGINAL, "fixed_kv_cache"))
    layers, live = SIZES[size].layers, baselines.PAST + 1
    assert before["ConcatV2"].launches - after["ConcatV2"].launches == after["Scatter"].launches == 2 * layers
    assert after["ConcatV2"].nbytes + after["Scatter"].nbytes < before["ConcatV2"].nbytes / 100
    embedding = 2 if SIZES[size].shards > 1 else 0  # tokens of other cards
    assert before.get("MaskedFill", Cost()).launches == embedding
    assert after["MaskedFill"].launches == embedding + layers
    for scores in ("Muls", "SoftmaxV2"):
        assert after[scores].nbytes * live == before[scores].nbytes * baselines.CAPACITY
    for slots in ("BatchMatMul", "BroadcastTo", "Transpose"):
        assert after[slots].activation_bytes > 1.1 * before[slots].activation_bytes


@pytest.mark.parametrize("size", baselines.SWEEPS)
def test_weights_are_read_once_whatever_the_batch(size: str) -> None:
    """Why a larger batch is cheap in decode: only the cache and the arithmetic grow."""
    batches = sorted({BATCH, *baselines.SWEEPS[size]})
    costs = [cost_of(size, "decode", baselines.SWEEP_STEP, batch) for batch in batches]
    hidden = SIZES[size].hidden
    rows = [2 * hidden * batch for batch in batches]  # of the embedding table
    assert len({cost.weight_bytes - row for cost, row in zip(costs, rows, strict=True)}) == 1
    assert [cost.cache_bytes // batch for cost, batch in zip(costs, batches, strict=True)] == [
        costs[0].cache_bytes // batches[0]
    ] * len(batches)
