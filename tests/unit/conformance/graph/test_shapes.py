"""Shapes, dtypes and origins that the graph itself does not state."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.conformance.graph.shapes import operations
from qwen2_npu.emulator.ge.proto import UnsupportedGraphError
from tests.unit.conformance.graph.build import Graph


def test_shapes_follow_from_the_inputs():
    graph = Graph()
    x, w = graph.data((4, 8)), graph.data((16, 8), weight=True)
    out = graph.op("MatMul", "x1 x2", x, graph.op("Transpose", "x perm", w, graph.const(1, 0)))
    transpose, product = operations(graph.lowered(out))
    assert (transpose.outputs[0].shape, transpose.outputs[0].origin, transpose.is_view) == ((8, 16), "weight", True)
    assert (product.outputs[0].shape, product.outputs[0].dtype) == ((4, 16), torch.bfloat16)
    assert product.outputs[0].origin == "activation"


def test_what_only_constants_feed_is_no_operator():
    graph = Graph()
    shape = graph.op("Pack", "x0 x1", graph.const(2), graph.const(16), axis=0, N=2)
    flat = graph.op("Reshape", "x shape", shape, graph.const(2))
    out = graph.op("Reshape", "x shape", graph.data((4, 8)), flat)
    (reshape,) = operations(graph.lowered(out))
    assert reshape.outputs[0].shape == (2, 16)


def test_a_cache_is_what_a_scatter_writes():
    graph = Graph()
    cache, index = graph.data((1, 8, 2, 4)), graph.data((1,), torch.int64)
    out = graph.in_place(
        "Scatter", "var indices updates", cache, index, graph.data((1, 1, 2, 4)), reduce="update", axis=1
    )
    (scatter,) = operations(graph.lowered(out))
    assert [value.origin for value in scatter.given] == ["cache", "activation", "activation"]
    assert scatter.outputs[0].origin == "cache"


def test_an_unknown_operator_is_named():
    graph = Graph()
    with pytest.raises(UnsupportedGraphError, match="NoSuchOperator"):
        operations(graph.lowered(graph.op("NoSuchOperator", "x", graph.data((1,)))))
