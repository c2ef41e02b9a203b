"""Peak memory of graphs whose lifetimes are plain to see."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.conformance.graph.memory import peak_activation_bytes
from tests.unit.conformance.graph.build import Graph

KB = 1024


def kilobyte(graph: Graph):
    return graph.data((KB // 2,))


def test_a_chain_holds_two_values_at_a_time():
    graph = Graph()
    value = kilobyte(graph)
    for _ in range(5):
        value = graph.op("Relu", "x", value)
    assert peak_activation_bytes(graph.lowered(value)) == 2 * KB


def test_a_value_read_late_stays():
    graph = Graph()
    first = value = graph.op("Relu", "x", kilobyte(graph))
    for _ in range(3):
        value = graph.op("Relu", "x", value)
    assert peak_activation_bytes(graph.lowered(graph.op("Add", "x1 x2", first, value))) == 3 * KB


def test_views_and_writes_in_place_take_no_memory():
    graph = Graph()
    cache, index = graph.data((1, 8, 2, 4)), graph.data((1,), torch.int64)
    new = graph.op("Reshape", "x shape", graph.data((8,)), graph.const(1, 1, 2, 4))
    out = graph.in_place("Scatter", "var indices updates", cache, index, new, reduce="update", axis=1)
    assert peak_activation_bytes(graph.lowered(out)) == 0


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("is_result", [False, True])
def test_a_view_keeps_its_source_alive(views: int, is_result: bool):
    graph = Graph()
    view = graph.op("Relu", "x", kilobyte(graph))
    for rows in range(1, views + 1):
        view = graph.op("Reshape", "x shape", view, graph.const(2 * rows, KB // 4 // rows))
    value = graph.op("Relu", "x", kilobyte(graph))
    value = graph.op("Relu", "x", value)
    result = view if is_result else graph.op("Relu", "x", view)
    assert peak_activation_bytes(graph.lowered(result, value)) == 3 * KB
