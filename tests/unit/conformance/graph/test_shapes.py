"""Shapes, dtypes and origins that the graph itself does not state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2_npu.conformance.graph import shapes
from qwen2_npu.conformance.graph.shapes import Operation, cache_inputs, operations
from qwen2_npu.emulator.ge.proto import Edge, Node, UnsupportedGraphError
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


# ---- origins: what makes a copy of the cache or of a weight visible -------------------------------------------------
SCATTER = "var indices updates"


def written_cache(graph: Graph, target=None):
    """A scatter into ``target``, or into a new input of the graph."""
    target = graph.data((1, 8, 2, 4)) if target is None else target
    index, new = graph.data((1,), torch.int64), graph.data((1, 1, 2, 4))
    return graph.in_place("Scatter", SCATTER, target, index, new, reduce="update", axis=1)


def origins(graph: Graph, *outputs) -> list[str]:
    return [op.outputs[0].origin for op in operations(graph.lowered(*outputs))]


def test_the_kinds_of_nodes():
    assert {"Data", "RefData"} == shapes.DATA
    assert {"Data", "RefData", "Const", "ConstPlaceHolder", "NetOutput"} == shapes.STRUCTURE
    assert {"Reshape", "Unsqueeze", "Squeeze", "ExpandDims"} == shapes.VIEWS


@pytest.mark.parametrize("type_", ["Data", "RefData"])
def test_every_input_that_a_scatter_writes_is_a_cache_and_no_other(type_):
    graph = Graph()
    caches = [graph.data((1, 8, 2, 4)) for _ in range(2)]
    other = graph.data((1, 8, 2, 4))
    graph.nodes = [replace(node, type=type_) for node in graph.nodes]
    for cache in caches:
        written_cache(graph, cache)
    copy = graph.op("TensorMove", "x", other)
    written_cache(graph, copy)
    graph.nodes.append(Node("Scatter_without", "Scatter", (None, other), (), (), {}, {}, (), ()))
    graph.op("Assign", "ref value", other, caches[0])
    assert cache_inputs(graph.nodes) == {cache.node for cache in caches}


PAGED = "key key_cache slot_mapping value value_cache"


@pytest.mark.parametrize("copied", ["", "key", "value"])
def test_a_paged_write_has_two_caches_and_a_copy_of_one_is_none(copied):
    graph = Graph()
    caches = {name: graph.data((3, 32, 2, 4)) for name in ("key", "value")}
    new, slots = graph.data((4, 2, 4)), graph.data((4,), torch.int32)
    into = {name: graph.op("TensorMove", "x", cache) if name == copied else cache for name, cache in caches.items()}
    inputs = (new, into["key"], slots, new, into["value"])
    graph.nodes.append(Node("paged", "ScatterPaKvCache", inputs, tuple(PAGED.split()), (), {0: 1, 1: 4}, {}, (), ()))
    assert cache_inputs(graph.nodes) == {cache.node for name, cache in caches.items() if name != copied}
    written = operations(graph.lowered(Edge("paged", 0)))[-1]
    assert [value.origin for value in written.outputs] == ["activation" if copied else "cache"] * 2


def test_the_operators_with_live_lengths_and_with_writes():
    named = {"IncreFlashAttention": "actual_seq_lengths", "FusedInferAttentionScore": "actual_seq_lengths_kv"}
    assert named == shapes.LENGTHS
    assert shapes.WRITES == {"Scatter": (0,), "ScatterPaKvCache": (1, 4)}


def test_a_view_is_what_it_looks_at_and_a_result_is_not():
    for origin, start in (
        ("weight", lambda graph: graph.data((1, 8, 2, 4), weight=True)),
        ("cache", written_cache),
        ("activation", lambda graph: graph.op("Relu", "x", graph.data((1, 8, 2, 4)))),
    ):
        graph = Graph()
        value = start(graph)
        flat = graph.op("Reshape", "x shape", value, graph.const(8, 8))
        wide = graph.op("Unsqueeze", "x", flat, axes=[0])
        moved = graph.op("Relu", "x", wide)
        assert origins(graph, moved)[-3:] == [origin, origin, "activation"]


def test_a_transpose_keeps_a_weight_and_nothing_else():
    for weight, expected in ((True, "weight"), (False, "activation")):
        graph = Graph()
        out = graph.op("Transpose", "x perm", graph.data((4, 8), weight=weight), graph.const(1, 0))
        (transpose,) = operations(graph.lowered(out))
        assert (transpose.outputs[0].origin, transpose.is_view) == (expected, weight)


def test_a_scatter_into_a_copy_is_no_cache_and_neither_is_what_reads_one():
    graph = Graph()
    cache = written_cache(graph)
    copy = graph.op("TensorMove", "x", cache)
    out = written_cache(graph, copy)
    assert origins(graph, out) == ["cache", "activation", "activation"]


# ---- live lengths ---------------------------------------------------------------------------------------------------
IFA = "query key0 value0 atten_mask actual_seq_lengths"


@pytest.mark.parametrize(
    ("lengths", "slots"),
    [((3,), 3 * 7), ((1,), 3 * 7), (None, None)],
    ids=["one_per_row", "one_for_all_rows", "not_given"],
)
def test_live_slots_are_summed_over_the_rows(lengths, slots):
    graph = Graph(batch=3, live=7)
    query, cache = graph.data((3, 1, 4, 16)), graph.data((3, 64, 2, 16))
    given = None if lengths is None else graph.host(lengths)
    out = graph.op(
        "IncreFlashAttention", IFA, query, cache, cache, None, given, num_heads=4, num_key_value_heads=2,
        input_layout="BSND", scale_value=0.25,
    )  # fmt: skip
    (attention,) = operations(graph.lowered(out))
    assert attention.live_slots == slots
    assert [value.origin for value in attention.given][3:] == ["constant"] * (lengths is not None)
    assert (len(attention.inputs), len(attention.given)) == (5, 3 + (lengths is not None))


def test_lengths_of_another_operator_are_no_live_slots_and_attention_may_name_none():
    graph = Graph(batch=3, live=7)
    query = graph.data((1, 8, 4, 16))
    attributes = {"num_heads": 4, "num_key_value_heads": 4, "input_layout": "BSND"}
    out = graph.op(
        "PromptFlashAttention",
        "query key value actual_seq_lengths",
        query,
        query,
        query,
        graph.host((1,)),
        **attributes,
    )
    assert [op.live_slots for op in operations(graph.lowered(out))] == [None]
    graph = Graph(batch=3, live=7)
    query, cache = graph.data((3, 1, 4, 16)), graph.data((3, 64, 4, 16))
    out = graph.op("IncreFlashAttention", "query key0 value0", query, cache, cache, scale_value=0.25, **attributes)
    assert [op.live_slots for op in operations(graph.lowered(out))] == [None]


@pytest.mark.parametrize(("promised", "dtype"), [(torch.int32, torch.int32), (None, torch.int64)])
def test_host_inputs_have_the_dtype_that_the_graph_promises(promised, dtype):
    graph = Graph(live=5)
    host = graph.host((1,))
    graph.nodes[-1] = replace(graph.nodes[-1], promised=(promised,))
    lowered = graph.lowered(host)
    tensor, origin = shapes._data(graph.nodes[0], lowered, False)
    assert (tensor.dtype, tensor.tolist(), origin) == (dtype, [5], "constant")


# ---- values ---------------------------------------------------------------------------------------------------------
def test_every_result_of_an_operator_has_a_shape():
    graph = Graph()
    x = graph.data((6, 4))
    split = graph.op("SplitV", "x size_splits split_dim", x, graph.const(1, 2, 3), graph.const(0), num_split=3)
    outs = [graph.op("Relu", "x", Edge(split.node, index)) for index in range(3)]
    found = operations(graph.lowered(*outs))
    assert [value.shape for value in found[0].outputs] == [(1, 4), (2, 4), (3, 4)]
    assert [op.outputs[0].shape for op in found[1:]] == [(1, 4), (2, 4), (3, 4)]


def test_what_is_folded_has_all_its_results():
    graph = Graph()
    split = graph.op(
        "SplitV", "x size_splits split_dim", graph.const(8, 4, 2), graph.const(1, 2), graph.const(0), num_split=2
    )
    out = graph.op("Reshape", "x shape", graph.data((4, 2)), Edge(split.node, 1))
    (reshape,) = operations(graph.lowered(out))
    assert reshape.outputs[0].shape == (4, 2)


def test_an_operator_with_one_input_that_is_no_constant_is_one():
    graph = Graph()
    x = graph.data((2,), torch.int64)
    for inputs in ((x, graph.const(1, 2)), (graph.const(1, 2), x)):
        found = operations(graph.lowered(graph.op("Add", "x1 x2", *inputs)))
        graph.nodes.pop()
        assert found[-1].outputs[0].origin == "activation"


def test_one_card_takes_part_unless_said_otherwise():
    node = Node("one", "Relu", (), (), (), {}, {}, (), ())
    assert Operation(node, (), ()).ranks == 1
    graph = Graph(ranks=4)
    first = graph.op("HcomAllReduce", "x", graph.data((4,)), group="nobody", reduction="sum")
    second = graph.op("HcomAllGather", "x", first, group="nobody", rank_size=2)
    assert [op.ranks for op in operations(graph.lowered(second))] == [4, 2]


def test_inputs_that_are_not_fed_do_not_keep_an_operator_from_being_folded():
    graph = Graph()
    first, second = (graph._add("Const", attributes={"value": torch.ones(2, 2)}) for _ in range(2))
    product = graph.op("MatMulV2", "x1 x2 bias offset_w", first, second, None, None)
    out = graph.op("Add", "x1 x2", graph.data((2, 2), torch.float32), product)
    (found,) = operations(graph.lowered(out))
    assert (found.node.type, found.given[1].origin) == ("Add", "constant")


def test_a_weight_that_is_written_is_no_weight_afterwards():
    graph = Graph()
    assert origins(graph, written_cache(graph, graph.data((1, 8, 2, 4), weight=True))) == ["activation"]
