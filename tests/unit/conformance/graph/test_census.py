"""Counts that add up, and the refusal of layers that do not repeat."""

from __future__ import annotations

import pytest

from qwen2_npu.conformance.graph.census import Census, LayeredCensus, take
from qwen2_npu.conformance.graph.cost import Cost
from tests.unit.conformance.graph.build import Graph


def census(nodes: int = 10, **operators: int) -> Census:
    costs = {name: Cost(flops=8 * count, launches=count) for name, count in operators.items()}
    return Census(nodes, costs, {"Reshape": 2})


def test_kernels_and_views_are_counted_apart():
    graph = Graph()
    x = graph.op("Relu", "x", graph.data((4,)))
    found = take(graph.lowered(graph.op("Reshape", "x shape", x, graph.const(2, 2))))
    assert (found.operators, found.views, found.nodes) == ({"Relu": 1}, {"Reshape": 1}, 5)


def test_a_layer_is_half_the_difference():
    few, more = census(10, MatMul=4, GatherV2=1), census(18, MatMul=8, GatherV2=1)
    layer = more.minus(few).halved()
    assert layer.operators == {"MatMul": 2}
    assert few.minus(layer, 2).plus(layer, 4) == more


def test_layers_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"MatMul: \d+ is not twice"):
        census(14, MatMul=7).minus(census(10, MatMul=4)).halved()


def test_nothing_is_negative():
    with pytest.raises(ValueError, match="MatMul: cannot take"):
        census(MatMul=1).minus(census(MatMul=2))


def test_json_and_back():
    layered = LayeredCensus(census(MatMul=1), census(Add=2), 77)
    assert LayeredCensus.from_json(layered.to_json()) == layered
    assert layered.of(3).operators == {"Add": 6, "MatMul": 1}
