"""Counts that add up, and the refusal of layers that do not repeat."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from qwen2_npu.conformance.graph.census import FEW, MORE, Census, LayeredCensus, of_layers, take
from qwen2_npu.conformance.graph.cost import Cost
from qwen2_npu.conformance.graph.lowering import Lowered
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


# ---- every number of every operator counts --------------------------------------------------------------------------
NUMBERS = [field.name for field in fields(Cost)]
FULL = Census(
    nodes=40,
    costs={
        name: Cost(*(2 * (at + place) for place in range(6))) for at, name in enumerate(("Add", "MatMul", "Mul"), 1)
    },
    views={"Reshape": 4, "Squeeze": 6, "Transpose": 8},
)
ONE_LESS = [
    *((name, number) for name in FULL.costs for number in NUMBERS),
    *((name, "") for name in FULL.views),
    ("nodes", ""),
]


def one_less(census: Census, name: str, number: str, by: int = 1) -> Census:
    """The census with one number smaller."""
    if name == "nodes":
        return replace(census, nodes=census.nodes - by)
    if not number:
        return replace(census, views={**census.views, name: census.views[name] - by})
    cost = census.costs[name]
    return replace(census, costs={**census.costs, name: replace(cost, **{number: getattr(cost, number) - by})})


@pytest.mark.parametrize(("name", "number"), ONE_LESS)
def test_each_number_is_combined_halved_refused_and_written(name: str, number: str) -> None:
    changed = one_less(FULL, name, number)
    assert changed != FULL
    assert changed.to_json() != FULL.to_json()
    assert Census.from_json(json.loads(json.dumps(changed.to_json()))) == changed
    left = FULL.minus(changed)
    assert left == one_less(
        Census(0, {name: Cost()} if number else {}, {} if number or name == "nodes" else {name: 0}), name, number, -1
    )
    assert changed.plus(left) == FULL
    with pytest.raises(ValueError, match=f"{name}: cannot take"):
        changed.minus(FULL)
    with pytest.raises(ValueError, match=rf"{name}: \d+ is not twice anything; the layers differ"):
        changed.halved()
    assert one_less(FULL, name, number, 2).halved() == one_less(FULL.halved(), name, number, 1)


def test_once_is_the_default_and_what_is_zero_is_left_out() -> None:
    assert FULL.plus(FULL) == FULL.plus(FULL, 1) == FULL.minus(FULL).plus(FULL, 2)
    assert FULL.plus(FULL).minus(FULL) == FULL
    assert FULL.minus(FULL) == Census(0, {}, {})
    assert FULL.cost == sum(FULL.costs.values(), Cost())


def layered_graph(layers: int, *, odd: bool = False):
    graph = Graph(layers=layers)
    value = graph.op("Exp", "x", graph.data((4,)))
    for layer in range(layers):
        for _ in range(3 + (odd and layer == 2)):
            value = graph.op("Relu", "x", value)
        value = graph.op("Reshape", "x shape", value, graph.const(4))
    return graph.lowered(value)


def test_a_census_is_what_stands_once_and_what_stands_in_every_layer() -> None:
    assert (FEW, MORE) == (2, 4)
    found = of_layers(layered_graph(FEW), layered_graph(MORE))
    assert (found.outside.operators, found.outside.views) == ({"Exp": 1}, {})
    assert (found.layer.operators, found.layer.views, found.layer.nodes) == ({"Relu": 3}, {"Reshape": 1}, 5)
    assert found.peak_activation_bytes == 2 * 4 * 2
    assert found.of(7) == take(layered_graph(7))
    with pytest.raises(ValueError, match="is not twice anything; the layers differ"):
        of_layers(layered_graph(FEW), layered_graph(MORE, odd=True))
    assert [take(layered_graph(count)).nodes for count in (1, 2)] == [8, 13]


def first_differs(layers: int) -> Lowered:
    """The first layer has another operator where the others have theirs; each has two of it but for that."""
    graph = Graph(layers=layers)
    value = graph.data((4,))
    for layer in range(layers):
        value = graph.op("Exp" if layer == 0 else "Relu", "x", value)
        value = graph.op("Relu", "x", value)
    return graph.lowered(value)


def test_a_layer_that_lacks_an_operator_is_told_outside_of_the_layers() -> None:
    found = of_layers(first_differs(FEW), first_differs(MORE))
    assert found.layer.operators == {"Relu": 2}
    assert found.outside.operators == {"Exp": 1, "Relu": -1}
    assert LayeredCensus.from_json(json.loads(json.dumps(found.to_json()))) == found
    for layers in (1, 2, 7):
        assert found.of(layers) == take(first_differs(layers))


def last_differs(layers: int) -> Lowered:
    """Three operators in each layer, and another one in the place of the last."""
    graph = Graph(layers=layers)
    value = graph.data((4,))
    for _ in range(3 * (layers - 1)):
        value = graph.op("Relu", "x", value)
    return replace(graph.lowered(graph.op("Exp", "x", value)), unlike=1)


def test_a_layer_that_is_unlike_the_others_is_counted_outside() -> None:
    found = of_layers(last_differs(FEW), last_differs(MORE))
    assert found.unlike == 1
    assert (found.layer.operators, found.outside.operators) == ({"Relu": 3}, {"Exp": 1})
    written = json.loads(json.dumps(found.to_json()))
    assert written["unlike"] == 1
    assert LayeredCensus.from_json(written) == found
    assert "unlike" not in of_layers(layered_graph(FEW), layered_graph(MORE)).to_json()
    for layers in (1, 2, 7):
        assert found.of(layers) == take(last_differs(layers))


def test_layers_of_which_not_even_one_is_there_are_refused() -> None:
    few, more = Graph(layers=FEW), Graph(layers=MORE)
    value = few.op("Relu", "x", few.data((4,)))
    last = more.data((4,))
    for _ in range(9):
        last = more.op("Relu", "x", last)
    with pytest.raises(ValueError, match=r"nodes: cannot take|Relu: cannot take"):
        of_layers(few.lowered(value), more.lowered(last))
