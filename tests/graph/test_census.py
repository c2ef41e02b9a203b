"""What torchair lowers every documented size to: the committed census, the invariants, the kernels of a layer."""

from __future__ import annotations

from functools import cache

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.baselines import BATCH, PAST, DocumentedGraph
from qwen2_npu.conformance.graph.census import FEW, MORE, LayeredCensus, of_layers
from qwen2_npu.conformance.graph.lowering import Lowered
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import EXPERTS, LADDER, ORIGINAL, QUANTIZED
from tests.graph import invariants

LAST = LADDER[-1]

FAST = {
    f"7B-decode-b4-{LAST}",
    f"7B-prefill-b4-{LAST}",
    f"0.5B-decode-b4-{LAST}",
    f"57B-A14B-decode-b4-{EXPERTS[-1]}",
    *(f"7B-decode-b4-{scheme}" for scheme in QUANTIZED),
}

IN_CI = {f"7B-decode-b4-{ORIGINAL}", f"7B-prefill-b4-{ORIGINAL}"}
"""Beside them: the other end of the ladder, whose code the last step does not run."""


def _marks(graph: DocumentedGraph) -> tuple[pytest.MarkDecorator, ...]:
    if str(graph) in FAST:
        return ()
    return (pytest.mark.slow, pytest.mark.slow_in_ci) if str(graph) in IN_CI else (pytest.mark.slow,)


GRAPHS = [
    pytest.param(graph, id=str(graph), marks=_marks(graph))
    for graph in baselines.documented()
    if graph.batch == BATCH or graph.size in baselines.MIXTURES
]
FINAL = [
    pytest.param(graph, id=str(graph), marks=_marks(graph))
    for graph in baselines.documented()
    if graph.step == SIZES[graph.size].ladder[-1]
]

LAYER_KERNELS = {"decode": 11, "prefill": 14}
"""Phase -> kernels of one layer with every step on, at most."""


COLLECTIVE_KERNELS = 4
"""More on one card of several: two all-reduces, and the Identity that torchair leaves beside each."""


DENSE_KERNELS, EXPERT_KERNELS = 3, 14
"""Of the MLP of a layer: two products and SwiGLU, or a mixture of experts."""


@cache
def lowered(graph: DocumentedGraph, layers: int) -> Lowered:
    return graph.lowered(layers)


@cache
def census_of(graph: DocumentedGraph) -> LayeredCensus:
    return of_layers(lowered(graph, FEW), lowered(graph, MORE))


@pytest.mark.parametrize("graph", GRAPHS)
def test_census_is_the_baseline(graph: DocumentedGraph, pytestconfig: pytest.Config) -> None:
    found = census_of(graph)
    if pytestconfig.option.update_graphs:
        baselines.update(graph, found, pytestconfig.option.update_graphs)
    problem = baselines.verdict(graph, found)
    assert not problem, problem


@pytest.mark.parametrize("graph", GRAPHS)
def test_invariants(graph: DocumentedGraph) -> None:
    problems = invariants.problems(lowered(graph, FEW), graph.optimizations, SIZES[graph.size].vocab)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("graph", FINAL)
def test_kernels_of_a_layer(graph: DocumentedGraph) -> None:
    layer = census_of(graph).layer
    allowed = LAYER_KERNELS[graph.phase]
    if SIZES[graph.size].shards > 1:
        allowed += COLLECTIVE_KERNELS
    if SIZES[graph.size].experts:
        allowed += EXPERT_KERNELS - DENSE_KERNELS
    assert layer.cost.launches <= allowed, layer.operators


@pytest.mark.parametrize("graph", [param for param in FINAL if param.values[0].phase == "decode"])
def test_decode_moves_the_weights_and_the_live_cache_and_little_else(graph: DocumentedGraph) -> None:
    size = SIZES[graph.size]
    cost = census_of(graph).of(size.layers).cost
    # Every weight but the embedding table, of which a row per token is read; a tied table is read as lm_head.
    read = size.parameters_with(graph.experts_read.most) if size.experts else size.parameters
    weights = 2 * (read - (0 if size.tied else size.vocab * size.hidden))
    live = 2 * 2 * size.layers * graph.batch * (PAST + 1) * size.kv_heads * size.head_dim
    assert weights + live <= cost.nbytes <= 1.05 * (weights + live)


def test_every_documented_graph_has_a_baseline_and_no_other_has() -> None:
    wanted = {str(graph) for graph in baselines.documented()}
    found = {
        f"{path.stem}-{key}" for path in baselines.FOLDER.glob("*.json") for key in baselines._read(path)["graphs"]
    }
    assert found == wanted
