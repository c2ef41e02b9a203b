"""Copies that only make a tensor contiguous leave the graph; copies that protect somebody's memory stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import qwen2_npu.ops  # noqa: F401 - torch.ops.npu
from qwen2_npu.graph.layout_copies import CLONE, drop_layout_copies

aten, npu = torch.ops.aten, torch.ops.npu


def clones_left(build):
    graph = fx.Graph()
    graph.output(build(graph))
    module = fx.GraphModule(torch.nn.Module(), graph)
    drop_layout_copies(module)
    return len(module.graph.find_nodes(op="call_function", target=CLONE))


def copied(graph, source):
    return graph.call_function(CLONE, (source,))


def swiglu(graph, source):
    return graph.call_function(npu.npu_swiglu.default, (source,))


def test_a_copy_between_operators_goes():
    assert clones_left(lambda g: swiglu(g, copied(g, g.call_function(aten.neg.default, (g.placeholder("x"),))))) == 0


def test_every_such_copy_goes():
    def build(g):
        negative = g.call_function(aten.neg.default, (g.placeholder("x"),))
        return tuple(swiglu(g, copied(g, negative)) for _ in range(3))

    assert clones_left(build) == 0


def test_a_graph_that_is_out_of_order_is_an_error():
    def build(g):
        first = g.call_function(aten.neg.default, (g.placeholder("x"),))
        second = g.call_function(aten.neg.default, (first,))
        first.prepend(second)
        return second

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        clones_left(build)


def test_a_copy_of_an_input_stays():
    assert clones_left(lambda g: swiglu(g, copied(g, g.placeholder("x")))) == 1


def test_a_returned_copy_stays():
    assert clones_left(lambda g: copied(g, g.call_function(aten.neg.default, (g.placeholder("x"),)))) == 1


def test_a_copy_that_a_view_reads_stays():
    def build(g):
        copy = copied(g, g.call_function(aten.neg.default, (g.placeholder("x"),)))
        return g.call_function(aten.view.default, (copy, [-1]))

    assert clones_left(build) == 1


def test_a_copy_that_another_operator_reads_after_one_of_ours_stays():
    def build(g):
        copy = copied(g, g.call_function(aten.neg.default, (g.placeholder("x"),)))
        return swiglu(g, copy), g.call_function(aten.view.default, (copy, [-1]))

    assert clones_left(build) == 1
