"""Rules of single steps, called one by one: the right number passes, one more or one fewer does not."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qwen2_npu import Optimizations
from qwen2_npu.conformance.graph.lowering import Lowered, Phase
from qwen2_npu.conformance.graph.shapes import GraphValue, Operation
from qwen2_npu.emulator.ge.proto import Edge, Node
from tests.graph import invariants
from tests.graph.invariants import Graph
from tests.unit.conformance.graph.build import value

LAYERS, BATCH, LIVE, VOCABULARY = 3, 2, 10, 160
EVERY = BATCH * LIVE
ALL = Optimizations.all()


HIDDEN, LOGITS = value(BATCH, 8), value(BATCH, VOCABULARY)
WEIGHT = value(8, 16, origin="weight")
EXPERTS = value(4, 8, 16, origin="weight")
CACHE = value(BATCH, 64, 2, 4, origin="cache")


def op(type_: str, *inputs: GraphValue | None, output: GraphValue = HIDDEN, reads: Sequence[str] = ()) -> Operation:
    """``reads``: the node that each input comes from; "" where none feeds it."""
    edges = tuple(Edge(name, 0) if name else None for name in reads)
    node = Node(type_.lower(), type_, edges, (), (), {}, {}, (None,), ((),))
    return Operation(node, inputs, (output,))


def named(operation: Operation, name: str) -> Operation:
    return replace(operation, node=replace(operation.node, name=name))


def node(type_: str, name: str) -> Node:
    return replace(op(type_).node, name=name)


def product(rows: int = BATCH, type_: str = "MatMul") -> Operation:
    return op(type_, value(rows, 8), WEIGHT, output=value(rows, 16))


HEAD = named(op("MatMul", HIDDEN, WEIGHT, output=LOGITS), "head")


def graph(
    ops: Sequence[Operation],
    optimizations: Optimizations = ALL,
    phase: Phase = "decode",
    nodes: Sequence[Node] = (),
    **lowered: Any,
) -> Graph:
    every = [*nodes, *(operation.node for operation in ops)]
    about = Lowered(phase, BATCH, LIVE, LAYERS, every, frozenset(), frozenset(), **lowered)
    return Graph(about, list(ops), optimizations, VOCABULARY)


def without(step: str) -> Optimizations:
    """All steps but this one."""
    return ALL.replace(**{step: False})


APART = without("one_rotary").replace(fused_qkv=False)
"""q, k and v by a product each."""


# ---- the list -------------------------------------------------------------------------------------------------------
def test_every_rule_is_in_the_list_once() -> None:
    signature = {"graph": "Graph", "return": "Problems"}
    written = [
        name
        for name, rule in inspect.getmembers(invariants, inspect.isfunction)
        if inspect.get_annotations(rule) == signature
    ]
    listed = [invariant.check.__name__ for invariant in invariants.INVARIANTS]
    assert sorted(listed) == sorted(written)


# ---- writes of the cache --------------------------------------------------------------------------------------------
def writes(type_: str, count: int) -> list[Operation]:
    if type_ == "Scatter":
        return [op(type_, CACHE, HIDDEN, reads=["k"])] * count
    return [op(type_, HIDDEN, CACHE, HIDDEN, HIDDEN, CACHE, reads=["", "k", "", "", "v"])] * count


WRITTEN: dict[str, tuple[Optimizations, Phase, dict[str, int]]] = {
    "paged": (ALL, "decode", {"Scatter": 0, "ScatterPaKvCache": LAYERS}),
    "prefill": (ALL, "prefill", {"Scatter": 2 * LAYERS, "ScatterPaKvCache": 0}),
    "apart": (without("kv_scatter"), "decode", {"Scatter": 2 * LAYERS, "ScatterPaKvCache": 0}),
}


@pytest.mark.parametrize("type_", ["Scatter", "ScatterPaKvCache"])
@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_kv_in_place_counts_both_operators_that_write(case: str, type_: str, more: int) -> None:
    optimizations, phase, counts = WRITTEN[case]
    found = max(counts[type_] + more, 0)
    ops = [each for name, count in counts.items() for each in writes(name, found if name == type_ else count)]
    made = graph(ops, optimizations, phase, [node("RefData", "k"), node("RefData", "v")])
    problems = list(invariants.kv_in_place(made))
    expected = f"{found} {type_} nodes, expected {counts[type_]}: "
    assert [problem[: len(expected)] for problem in problems] == [expected] * (found != counts[type_])


# ---- a mixture of experts -------------------------------------------------------------------------------------------
ROUTED = {"MoeGatingTopKSoftmax": 1, "MoeInitRoutingV3": 1, "GroupedMatmul": 2, "MoeFinalizeRoutingV2": 1}
"""GE operator -> how many a layer of experts has. Written again here, since the rule's own table is under test."""

INPUTS = [node("Data", "first"), node("Data", "experts")]


def grouped(source: str) -> Operation:
    return op("GroupedMatmul", HIDDEN, None, EXPERTS, reads=["first", "", source])


def mixture(sparse: int, **more: int) -> list[Operation]:
    """``more``: type of operator -> how many there are beside the right number."""
    return [
        grouped("experts") if type_ == "GroupedMatmul" else op(type_, HIDDEN, reads=["first"])
        for type_, count in ROUTED.items()
        for _ in range(count * sparse + more.get(type_, 0))
    ]


@pytest.mark.parametrize("sparse", [0, 1, 2])
@pytest.mark.parametrize("type_", ROUTED)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_grouped_experts_counts_each_operator(type_: str, more: int, sparse: int) -> None:
    count = ROUTED[type_] * sparse
    found = max(count + more, 0)
    problems = list(invariants.grouped_experts(graph(mixture(sparse, **{type_: more}), nodes=INPUTS, sparse=sparse)))
    expected = f"{found} {type_}, expected {ROUTED[type_]} in each of {sparse} layers with experts"
    assert problems == [expected] * (found != count)


READERS: dict[str, tuple[Operation, str | None]] = {
    # what is done with weights, and what is said of it; None: nothing
    "grouped_product": (grouped("experts"), None),
    "grouped_product_of_a_referenced_input": (grouped("referenced"), None),
    "grouped_product_of_a_copy": (
        grouped("copy"), "groupedmatmul reads copy, not the experts' weights themselves",
    ),
    "grouped_product_of_nothing": (
        grouped(""), "groupedmatmul reads None, not the experts' weights themselves",
    ),
    "another_product": (
        op("BatchMatMulV2", HIDDEN, EXPERTS, reads=["first", "experts"]),
        "batchmatmulv2 (BatchMatMulV2) reads the weights of the experts (4, 8, 16)",
    ),
    "first_input": (
        op("Transpose", EXPERTS, reads=["experts"]),
        "transpose (Transpose) reads the weights of the experts (4, 8, 16)",
    ),
    "another_weight": (op("MatMul", HIDDEN, WEIGHT, reads=["first", "copy"]), None),
    "activation_of_three_dimensions": (op("BatchMatMul", value(4, 8, 16), reads=["copy"]), None),
    "cache": (op("Slice", value(4, 8, 16, origin="cache"), reads=["copy"]), None),
}  # fmt: skip


@pytest.mark.parametrize("case", READERS)
def test_grouped_experts_looks_at_who_reads_the_weights(case: str) -> None:
    reader, message = READERS[case]
    ops = [*mixture(1), reader]
    if reader.node.type == "GroupedMatmul":  # in place of one, so that their number stays
        ops.remove(grouped("experts"))
    nodes = [*INPUTS, node("RefData", "referenced"), node("TensorMove", "copy")]
    assert list(invariants.grouped_experts(graph(ops, nodes=nodes, sparse=1))) == [message] * (message is not None)


# ---- products -------------------------------------------------------------------------------------------------------
PRODUCTS: dict[str, tuple[Optimizations, Phase, int, int, int]] = {
    # steps, phase, layers with experts, products with weights beside the head, and how many fewer the last layer has
    "none": (Optimizations.none(), "decode", 0, 21, 0),
    "none_of_experts": (Optimizations.none(), "prefill", 2, 29, 0),
    "fused_qkv": (Optimizations.up_to("fused_qkv"), "prefill", 0, 15, 0),
    "fused_gate_up": (Optimizations.only("fused_gate_up"), "decode", 0, 18, 0),
    "decode": (ALL, "decode", 0, 12, 0),
    "decode_of_experts": (ALL, "decode", 1, 16, 0),
    "decode_of_experts_alone": (ALL, "decode", 3, 24, 0),
    "kept_alone": (ALL, "prefill", 0, 11, 1),
    "kept_alone_of_experts": (ALL, "prefill", 3, 23, 1),
    "kept_alone_and_not_fused": (APART, "prefill", 0, 18, 0),
    "all_positions": (without("last_layer"), "prefill", 0, 12, 0),
}


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_fused_products_counts_those_with_weights(case: str, more: int) -> None:
    optimizations, phase, sparse, count, fewer = PRODUCTS[case]
    ops = [*[product()] * (count + more), op("MatMul", HIDDEN, HIDDEN), HEAD]
    problems = list(invariants.fused_products(graph(ops, optimizations, phase, sparse=sparse)))
    assert len(problems) == (more != 0)
    for problem in problems:
        assert problem.startswith(f"{count + more} products with weights in 3 layers, expected ")
        assert f"4 more in each of {sparse} with experts and {fewer} fewer in the last" in problem


ROWS: dict[str, tuple[Optimizations, int, int]] = {
    # steps, layers with experts, products of every position
    "fused": (ALL, 0, 9),
    "fused_of_one_sparse_layer": (ALL, 1, 9),
    "fused_of_sparse_layers": (ALL, 3, 13),
    "apart": (APART, 0, 14),
    "apart_of_sparse_layers": (APART, 3, 18),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_last_layer_on_kept_positions_counts_products_of_every_position(case: str, more: int) -> None:
    optimizations, sparse, count = ROWS[case]
    ops = [product(EVERY)] * (count + more) + [product()] * 5
    problems = list(invariants.last_layer_on_kept_positions(graph(ops, optimizations, "prefill", sparse=sparse)))
    expected = f"products by rows: {{20: {count + more}, 2: 5}}, expected {count} of 20 and the others of 2"
    assert problems == [expected] * (more != 0)


@pytest.mark.parametrize("others", [[], [3], [BATCH, 3], [BATCH, EVERY + 1]])
def test_last_layer_on_kept_positions_has_products_of_two_sizes(others: list[int]) -> None:
    ops = [product(EVERY)] * 9 + [product(rows) for rows in others]
    (problem,) = invariants.last_layer_on_kept_positions(graph(ops, phase="prefill"))
    assert problem.startswith("products by rows: {20: 9")


GROUPED_ROWS: dict[str, tuple[dict[int, int], bool]] = {
    # rows -> how many grouped products, and whether they are right; four experts for each token
    "none": ({}, True),
    "last_layer_of_two": ({80: 2, 8: 2}, True),
    "last_layer_of_three": ({80: 4, 8: 2}, True),
    "one_of_the_kept": ({80: 2, 8: 1}, False),
    "three_of_the_kept": ({80: 2, 8: 3}, False),
    "one_row_more": ({80: 2, 9: 2}, False),
    "one_row_fewer": ({80: 2, 7: 2}, False),
    "every_position": ({80: 4}, False),
    "every_position_of_one_layer": ({80: 2}, False),
}


@pytest.mark.parametrize("case", GROUPED_ROWS)
def test_last_layer_on_kept_positions_has_two_grouped_products_of_the_kept(case: str) -> None:
    counts, right = GROUPED_ROWS[case]
    ops = [product(EVERY)] * 9 + [product()] * 3
    ops += [product(rows, "GroupedMatmul") for rows, count in counts.items() for _ in range(count)]
    problems = list(invariants.last_layer_on_kept_positions(graph(ops, phase="prefill")))
    expected = f"grouped products by rows: {counts}, expected 2 of 0.1 times the others'"
    assert problems == [expected] * (not right)


# ---- masks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("optimizations", "phase", "allowed"),
    [(ALL, "prefill", 1), (ALL, "decode", 0), (without("last_layer"), "prefill", 0)],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_repeated_in_layers_allows_the_mask_of_the_kept(
    optimizations: Optimizations, phase: Phase, allowed: int, ranks: int
) -> None:
    tables = [op("GatherV2", WEIGHT, HIDDEN)] * 3
    allowed += ranks - 1  # of an embedding table that is cut
    for count in (allowed, allowed + 1, allowed + 2):
        made = graph(tables + [op("Less", HIDDEN)] * count, optimizations, phase, ranks=ranks)
        expected = ["less (Less): masks and angles are no work of the graph"] * (count - allowed)
        assert list(invariants.nothing_repeated_in_layers(made)) == expected


@pytest.mark.parametrize("type_", ["IncreFlashAttention", "FusedInferAttentionScore"])
def test_live_attention_asks_both_operators_for_lengths(type_: str) -> None:
    asked = op(type_, HIDDEN, CACHE, CACHE)
    assert not list(invariants.live_attention(graph([replace(asked, live_slots=0)])))
    assert len(list(invariants.live_attention(graph([asked, replace(asked, live_slots=5), asked])))) == 2


# ---- several cards --------------------------------------------------------------------------------------------------
CARDS = Optimizations.up_to("mm_all_reduce")
SUMS: dict[str, tuple[Optimizations, Phase, int, int, tuple[int, int, int]]] = {
    # steps, phase, ranks, layers with experts; products with their sum, sums alone, gathers
    "one_card": (CARDS, "prefill", 1, 0, (0, 0, 0)),
    "one_card_of_experts": (CARDS, "prefill", 1, 3, (0, 0, 0)),
    "not_fused": (ALL, "prefill", 2, 0, (0, 7, 1)),
    "not_fused_of_experts": (ALL, "prefill", 2, 3, (0, 7, 1)),
    "decode": (CARDS, "decode", 2, 0, (0, 7, 1)),
    "decode_of_experts": (CARDS, "decode", 2, 3, (0, 7, 1)),
    "fused": (CARDS, "prefill", 2, 0, (4, 3, 1)),
    "fused_on_four_cards": (CARDS, "prefill", 4, 0, (4, 3, 1)),
    "fused_of_experts": (CARDS, "prefill", 2, 3, (2, 5, 1)),
    "every_position": (CARDS.replace(last_layer=False), "prefill", 2, 0, (6, 1, 1)),
    "every_position_of_experts": (CARDS.replace(last_layer=False), "prefill", 2, 3, (3, 4, 1)),
}


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_collectives_counts_sums_and_gathers(case: str, place: int, more: int) -> None:
    optimizations, phase, ranks, sparse, counts = SUMS[case]
    types = ("MatmulAllReduce", "HcomAllReduce", "HcomAllGather")
    found = max(counts[place] + more, 0)
    ops = [op(type_, HIDDEN) for at, type_ in enumerate(types) for _ in range(found if at == place else counts[at])]
    problems = list(invariants.collectives(graph(ops, optimizations, phase, ranks=ranks, sparse=sparse)))
    expected = f"{found} {types[place]}, expected {counts[place]} for {ranks} ranks and 3 layers"
    assert problems == [expected] * (found != counts[place])
