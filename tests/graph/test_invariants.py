"""Every invariant alone, on graphs written by hand: one node too many or too few, and the most that it allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from qwen2_npu import LADDER, Optimizations
from qwen2_npu.conformance.graph.cost import COLLECTIVES
from qwen2_npu.conformance.graph.lowering import Lowered, Phase
from qwen2_npu.conformance.graph.shapes import GraphValue, Operation
from qwen2_npu.emulator.ge.proto import Edge, Node
from qwen2_npu.optimizations import QUANTIZED
from tests.graph import invariants
from tests.graph.invariants import Graph, graph_problems, static_inputs
from tests.unit.conformance.graph.build import value

LAYERS, BATCH, VOCABULARY = 3, 2, 160
FUSED = Optimizations.up_to("mm_all_reduce")


WEIGHT, TABLE, CACHE = (
    value(8, 16, origin="weight"),
    value(64, 8, origin="weight"),
    value(BATCH, 64, 2, 4, origin="cache"),
)
INTEGERS, SCALES = value(8, 16, origin="weight", dtype=torch.int8), value(16, origin="weight")
QUANTISED = value(BATCH, 1, 8, dtype=torch.int8)
HIDDEN, LOGITS = value(BATCH, 1, 8), value(BATCH, 1, VOCABULARY)
LIVE = 10
PROMPT = value(BATCH, LIVE, 8)


@dataclass
class Written:
    """A graph under construction; operators are found again by type."""

    phase: Phase = "decode"
    optimizations: Optimizations = field(default_factory=Optimizations.all)
    ranks: int = 1
    nodes: list[Node] = field(default_factory=list)
    ops: list[Operation] = field(default_factory=list)

    def node(self, type_: str, *inputs: Edge | None, **more: Any) -> Node:
        fields = {"references": {}, "attributes": {}, "promised": (None,), "shapes": ((),)} | more
        made = Node(f"{type_}_{len(self.nodes)}", type_, inputs, (), (), **fields)
        self.nodes.append(made)
        return made

    def op(self, type_: str, given: list[GraphValue], output: GraphValue, *edges: Edge, **more: Any) -> None:
        self.ops.append(Operation(self.node(type_, *edges), tuple(given), (output,), **more))

    def scatter(self, *, into: str = "RefData") -> None:
        target = self.node(into, attributes={"index": len(self.nodes)})
        self.op("Scatter", [CACHE, value(BATCH), HIDDEN], CACHE, Edge(target.name, 0))

    def paged_scatter(self, *, into: str = "RefData") -> None:
        keys, values = (self.node(each, attributes={"index": len(self.nodes)}) for each in ("RefData", into))
        edges = (None, Edge(keys.name, 0), None, None, Edge(values.name, 0))
        self.op("ScatterPaKvCache", [HIDDEN, CACHE, value(BATCH), HIDDEN, CACHE], CACHE, *edges)

    def of_type(self, type_: str) -> list[int]:
        return [index for index, op in enumerate(self.ops) if op.node.type == type_]

    def without(self, type_: str) -> None:
        """The last operator of a type goes."""
        del self.ops[self.of_type(type_)[-1]]

    def change(self, type_: str, **fields: Any) -> None:
        """Fields of the last operator of a type."""
        index = self.of_type(type_)[-1]
        self.ops[index] = replace(self.ops[index], **fields)

    def problems(self) -> list[str]:
        lowered = Lowered(self.phase, BATCH, LIVE, LAYERS, self.nodes, frozenset(), frozenset(), self.ranks)
        return graph_problems(Graph(lowered, self.ops, self.optimizations, VOCABULARY))


def _given(states: GraphValue, graph: Written) -> GraphValue:
    """What products of a graph are given in place of these hidden states."""
    return replace(states, dtype=torch.int8) if graph.optimizations.w8a8 else states


def sound(phase: Phase = "decode", optimizations: Optimizations | None = None, ranks: int = 1) -> Written:
    """The graph that the invariants ask for."""
    made = Written(phase, Optimizations.all() if optimizations is None else optimizations, ranks)
    fused = ranks > 1 and made.optimizations.mm_all_reduce and phase == "prefill"
    for table in (TABLE, TABLE, value(BATCH, 8)):  # the embedding, cos, sin
        made.op("GatherV2", [table, value(BATCH)], HIDDEN)
    if ranks > 1:
        for mask in ("Less", "GreaterEqual", "LogicalOr", "MaskedFill", "MaskedFill"):
            made.op(mask, [HIDDEN], HIDDEN)
        made.op("HcomAllReduce", [HIDDEN], HIDDEN)
    paged = phase == "decode" and made.optimizations.kv_scatter
    if kept := phase == "prefill" and made.optimizations.last_layer:
        made.op("Less", [HIDDEN], HIDDEN)  # the mask of the kept positions
    product = invariants.EIGHT_BIT_PRODUCTS.get(made.optimizations.scheme, "MatMul")
    apart = "MatMulV2" if product == "MatMul" else product
    operands = {"MatMul": [WEIGHT]}.get(product, [INTEGERS, SCALES])
    for layer in range(LAYERS):
        if made.optimizations.w8a8:
            norm = "DynamicQuant" if made.optimizations.separate_norm_quant else "AddRmsNormDynamicQuant"
            for kind in ("DynamicQuant" if layer == 0 else norm, "DynamicQuant", norm, "DequantSwigluQuant"):
                made.op(kind, [HIDDEN], QUANTISED)
        states, few = PROMPT if phase == "prefill" else HIDDEN, kept and layer == LAYERS - 1
        if few:  # k and v of all positions; they and q are products with parts of a weight
            made.op(apart, [_given(PROMPT, made), value(8, 16)], PROMPT)
            states = HIDDEN
            made.op(apart, [_given(HIDDEN, made), value(8, 16)], HIDDEN)
        for _ in range(5 - 2 * made.optimizations.fused_qkv - made.optimizations.fused_gate_up - few):
            made.op(product, [_given(states, made), *operands], states)
        for _ in range(2):  # o_proj and down_proj, whose results are summed over the ranks
            if fused and not few:
                made.op("MatmulAllReduce", [states, WEIGHT], states)
            else:
                made.op(product, [_given(states, made), *operands], states)
                if ranks > 1:
                    made.op("HcomAllReduce", [HIDDEN], HIDDEN)
            if not paged:
                made.scatter()
        if paged:
            made.paged_scatter()
        if phase == "decode" and made.optimizations.one_rotary:
            made.op("RotaryMul", [HIDDEN, HIDDEN, HIDDEN], HIDDEN)
        made.op("BatchMatMul", [HIDDEN, HIDDEN], HIDDEN)  # with no weight: no product that is counted
        if phase == "decode":
            made.op("IncreFlashAttention", [HIDDEN, CACHE, CACHE], HIDDEN, live_slots=20)
        else:
            made.op("PromptFlashAttention", [HIDDEN, HIDDEN, HIDDEN], HIDDEN)
    made.op("MatMul", [HIDDEN, WEIGHT], LOGITS)
    if ranks > 1:
        made.op("HcomAllGather", [LOGITS], value(BATCH, 1, VOCABULARY * ranks))
    return made


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("step", [*LADDER, "mm_all_reduce", *QUANTIZED])
def test_a_sound_graph_has_no_problem(step: str, phase: Phase, ranks: int) -> None:
    assert sound(phase, Optimizations.up_to(step), ranks).problems() == []


Change = Callable[[Written], None]

COPIED = {
    f"kv_in_place-{type_}": (
        lambda graph, type_=type_: graph.op(type_, [HIDDEN, CACHE], CACHE), "copies a whole KV cache",
    )
    for type_ in (
        "TensorMove", "Identity", "ConcatV2", "ConcatD", "Pack", "StridedSliceV2", "Transpose", "Slice", "SplitV",
    )
}  # fmt: skip
MASKS = {
    f"nothing_repeated_in_layers-{type_}": (
        lambda graph, type_=type_: graph.op(type_, [HIDDEN], HIDDEN),
        f"({type_}): masks and angles are no work of the graph",
    )
    for type_ in (
        "Less", "LessEqual", "Greater", "GreaterEqual", "LogicalAnd", "LogicalOr", "LogicalNot", "SelectV2", "Select",
        "MaskedFill", "Range", "Triu", "Tril", "Cos", "Sin",
    )
}  # fmt: skip


def head(graph: Written) -> None:
    graph.op("MatMul", [HIDDEN, WEIGHT], LOGITS)


def writes_elsewhere(graph: Written) -> None:
    """A Scatter whose target is no input of the graph."""
    graph.without("Scatter")
    graph.scatter(into="TensorMove")


def no_target(graph: Written) -> None:
    index = graph.of_type("Scatter")[-1]
    op = graph.ops[index]
    graph.ops[index] = replace(op, node=replace(op.node, inputs=(None,)))


def value_elsewhere(graph: Written) -> None:
    graph.without("ScatterPaKvCache")
    graph.paged_scatter(into="TensorMove")


def other_rotary(graph: Written) -> None:
    graph.without("RotaryMul")
    graph.op("ApplyRotaryPosEmb", [HIDDEN, HIDDEN], HIDDEN)


def product_of_three_dimensions(graph: Written) -> None:
    graph.ops.pop(graph.of_type("MatMul")[0])
    graph.op("BatchMatMulV2", [HIDDEN, WEIGHT], HIDDEN)


APART = Optimizations.all().replace(kv_scatter=False)
WRITES_APART = {f"kv_in_place-{name}" for name in (
    "one_write_more", "one_write_fewer", "write_to_a_copy", "write_to_nothing",
)}  # fmt: skip
"""Faults of graphs that write k and v one after the other."""


FAULTS: dict[str, tuple[Change, str]] = {
    **COPIED,
    **MASKS,
    "kv_in_place-one_write_more": (lambda graph: graph.scatter(), "7 Scatter nodes, expected 6"),
    "kv_in_place-one_write_fewer": (lambda graph: graph.without("Scatter"), "5 Scatter nodes, expected 6"),
    "kv_in_place-write_to_a_copy": (writes_elsewhere, "a copy, not an input of the graph"),
    "kv_in_place-write_to_nothing": (no_target, "writes None, a copy, not an input of the graph"),
    "kv_in_place-assign": (
        lambda graph: graph.op("Assign", [HIDDEN, HIDDEN], HIDDEN), "copies a result back into an input",
    ),
    "no_wide_copies-weight": (
        lambda graph: graph.op("Cast", [WEIGHT], value(8, 16, dtype=torch.float32)),
        "casts a whole weight (8, 16) to torch.float32",
    ),
    "no_wide_copies-cache": (lambda graph: graph.op("Cast", [CACHE], HIDDEN), "casts a whole cache"),
    "head_on_last_token-one_token_more": (
        lambda graph: graph.change("MatMul", outputs=(value(BATCH + 1, 1, VOCABULARY),)),
        "computes logits of 3 tokens, expected 2",
    ),
    "head_on_last_token-one_token_fewer": (
        lambda graph: graph.change("MatMul", outputs=(value(BATCH - 1, 1, VOCABULARY),)),
        "computes logits of 1 tokens, expected 2",
    ),
    "head_on_last_token-two_heads": (head, "2 products with lm_head, expected 1"),
    "head_on_last_token-no_head": (lambda graph: graph.without("MatMul"), "0 products with lm_head, expected 1"),
    "fused_products-one_more": (
        lambda graph: graph.op("MatMulV2", [HIDDEN, WEIGHT], HIDDEN), "13 products with weights in 3 layers",
    ),
    "fused_products-one_fewer": (
        lambda graph: graph.ops.pop(graph.of_type("MatMul")[0]), "11 products with weights in 3 layers, expected 4 per",
    ),
    "nothing_repeated_in_layers-one_table_more": (
        lambda graph: graph.op("GatherV2", [TABLE, value(BATCH)], HIDDEN), "4 reads of tables, expected 3",
    ),
    "nothing_repeated_in_layers-another_operator": (
        lambda graph: graph.op("IndexByTensor", [TABLE, value(BATCH)], HIDDEN), "4 reads of tables, expected 3",
    ),
    "nothing_repeated_in_layers-one_table_fewer": (
        lambda graph: graph.without("GatherV2"), "2 reads of tables, expected 3",
    ),
    "kv_in_place-one_write_of_both_more": (
        lambda graph: graph.paged_scatter(), "4 ScatterPaKvCache nodes, expected 3: one for k and v per layer",
    ),
    "kv_in_place-one_write_of_both_fewer": (
        lambda graph: graph.without("ScatterPaKvCache"), "2 ScatterPaKvCache nodes, expected 3",
    ),
    "kv_in_place-writes_apart": (lambda graph: graph.scatter(), "1 Scatter nodes, expected 0: none per layer"),
    "kv_in_place-value_to_a_copy": (value_elsewhere, "a copy, not an input of the graph"),
    "one_rotary_operator-one_more": (
        lambda graph: graph.op("RotaryMul", [HIDDEN, HIDDEN, HIDDEN], HIDDEN), "{'RotaryMul': 4} turn q and k",
    ),
    "one_rotary_operator-one_fewer": (
        lambda graph: graph.without("RotaryMul"), "{'RotaryMul': 2} turn q and k, expected one RotaryMul in each of 3",
    ),
    "one_rotary_operator-another": (other_rotary, "{'RotaryMul': 2, 'ApplyRotaryPosEmb': 1} turn q and k"),
    "plain_products-three_dimensions": (
        product_of_three_dimensions, "(BatchMatMulV2) is a product of (2, 1, 8), expected rows alone",
    ),
    "live_attention-no_lengths": (
        lambda graph: graph.change("IncreFlashAttention", live_slots=None), "is given no actual_seq_lengths",
    ),
    **{
        f"collectives-{type_}": (
            lambda graph, type_=type_: graph.op(type_, [HIDDEN], HIDDEN),
            f"1 {type_}, expected 0" if type_ in ("HcomAllReduce", "HcomAllGather", "MatmulAllReduce")
            else f"({type_}): a collective that the model does not need",
        )
        for type_ in sorted(COLLECTIVES)
    },
}  # fmt: skip


SEPARATE = Optimizations.up_to("w8a8").replace(separate_norm_quant=True)

EIGHT_BIT_FAULTS: dict[str, tuple[str, Change, str]] = {
    # name -> scheme, what is done, what is said of it
    "eight_bit_weights-float_product": (
        "w8a16", lambda graph: graph.change("WeightQuantBatchMatmulV2", node=graph.node("MatMul")),
        "(MatMul) multiplies with a weight, expected WeightQuantBatchMatmulV2",
    ),
    "eight_bit_weights-float_weight": (
        "w8a8", lambda graph: graph.change("QuantBatchMatmulV3", inputs=(QUANTISED, WEIGHT, SCALES)),
        "reads a weight (8, 16) of torch.bfloat16 with w8a8",
    ),
    "eight_bit_weights-head": (
        "w8a8", lambda graph: graph.change("MatMul", inputs=(HIDDEN, INTEGERS)),
        "reads a weight (8, 16) of torch.int8 with w8a8",
    ),
    "eight_bit_weights-float_activations": (
        "w8a8", lambda graph: graph.change("QuantBatchMatmulV3", inputs=(HIDDEN, INTEGERS, SCALES)),
        "is given activations of torch.bfloat16",
    ),
    "activations_quantised_once-one_more": (
        "w8a8", lambda graph: graph.op("DynamicQuant", [HIDDEN], QUANTISED),
        "activations are quantised 13 times in 3 layers, expected 12",
    ),
    "activations_quantised_once-one_fewer": (
        "w8a8", lambda graph: graph.without("DequantSwigluQuant"),
        "activations are quantised 11 times in 3 layers, expected 12",
    ),
    "activations_quantised_once-swiglu": (
        "w8a8", lambda graph: graph.op("SwiGlu", [HIDDEN], HIDDEN), "1 SwiGlu, expected none",
    ),
    "activations_quantised_once-norm": (
        "w8a8", lambda graph: graph.change("AddRmsNormDynamicQuant", node=graph.node("DynamicQuant")),
        "4 AddRmsNormDynamicQuant in 3 layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", EIGHT_BIT_FAULTS)
def test_each_fault_of_8_bit_weights_is_the_one_problem(fault: str) -> None:
    scheme, change, message = EIGHT_BIT_FAULTS[fault]
    graph = sound(optimizations=Optimizations.up_to(scheme))
    change(graph)
    (problem,) = graph.problems()
    assert problem.startswith(f"{fault.partition('-')[0]}: ")
    assert message in problem


def test_8_bit_weights_that_nobody_asked_for() -> None:
    graph = sound()
    graph.ops[graph.of_type("MatMul")[0]] = replace(graph.ops[graph.of_type("MatMul")[0]], inputs=(HIDDEN, INTEGERS))
    (problem,) = graph.problems()
    assert "reads a weight (8, 16) of torch.int8 with ordinary weights" in problem


def test_a_norm_that_quantises_where_two_operators_should() -> None:
    graph = sound(optimizations=SEPARATE)
    assert graph.problems() == []
    graph.change("DynamicQuant", node=graph.node("AddRmsNormDynamicQuant"))
    (problem,) = graph.problems()
    assert "1 AddRmsNormDynamicQuant in 3 layers" in problem


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_the_one_problem_of_its_invariant(fault: str) -> None:
    change, message = FAULTS[fault]
    graph = sound(optimizations=APART if fault in WRITES_APART else None)
    change(graph)
    (problem,) = graph.problems()
    assert problem.startswith(f"{fault.partition('-')[0]}: ")
    assert message in problem


SEVERAL = {
    # Checks that look at every node of a type: a sound one, or another offender, before this one hides nothing.
    "kv_in_place-assign": 2,
    "kv_in_place-TensorMove": 2,
    "no_wide_copies-weight": 2,
    "nothing_repeated_in_layers-Cos": 2,
    "collectives-HcomBroadcast": 2,
}


@pytest.mark.parametrize("fault", SEVERAL)
def test_each_of_several_offenders_is_named(fault: str) -> None:
    graph = sound()
    for _ in range(SEVERAL[fault]):
        FAULTS[fault][0](graph)
    problems = graph.problems()
    assert len(set(problems)) == SEVERAL[fault]
    assert all(FAULTS[fault][1] in problem for problem in problems)


def test_a_cast_behind_one_that_is_allowed_is_seen() -> None:
    graph = sound()
    for given in (HIDDEN, value(8, origin="weight"), WEIGHT):
        graph.op("Cast", [given], HIDDEN)
    assert len(graph.problems()) == 1


def test_every_head_is_looked_at() -> None:
    graph = sound()
    graph.op("MatMul", [HIDDEN, WEIGHT], value(BATCH + 1, 1, VOCABULARY))
    first, second = graph.problems()
    assert "computes logits of 3 tokens, expected 2: one per row" in first
    assert "2 products with lm_head, expected 1" in second


def test_a_cache_is_as_large_as_the_smallest_that_is_written() -> None:
    """Layers may have caches of several sizes; what is smaller than all of them is a part of one."""
    graph = sound(optimizations=APART)
    small = value(BATCH, 32, 2, 4, origin="cache")
    index = graph.of_type("Scatter")[1]
    graph.ops[index] = replace(graph.ops[index], inputs=(small, *graph.ops[index].inputs[1:]))
    assert graph.problems() == []
    for given, problems in ((value(BATCH, 31, 2, 4, origin="cache"), 0), (small, 1)):
        graph.op("Identity", [given], HIDDEN)
        assert len(graph.problems()) == problems
    graph = sound(optimizations=APART)
    index = graph.of_type("Scatter")[0]
    graph.ops[index] = replace(graph.ops[index], inputs=(value(1), CACHE, HIDDEN))
    graph.op("Identity", [value(BATCH, 63, 2, 4, origin="cache")], HIDDEN)
    assert graph.problems() == []


def test_an_input_of_another_shape_is_said_for_each_and_a_lowered_graph_is_looked_into() -> None:
    graph = Written()
    names = [graph.node("Data", attributes={"index": at}, shapes=((-1,),)).name for at in range(2)]
    lowered = Lowered("decode", BATCH, 10, LAYERS, graph.nodes, frozenset(), frozenset())
    found = invariants.problems(lowered, Optimizations.all(), VOCABULARY)
    assert [name in problem for name, problem in zip(names, found, strict=True)] == [True, True]
    nothing = Lowered("decode", BATCH, 10, LAYERS, [], frozenset(), frozenset())
    assert any(
        "0 ScatterPaKvCache nodes, expected 3" in problem
        for problem in invariants.problems(nothing, Optimizations.all(), VOCABULARY)
    )


COUNTS = {
    # type of collective -> how many of 3 layers; of two ranks, not fused and fused, where the last layer has few rows
    "HcomAllReduce": (7, 3),
    "HcomAllGather": (1, 1),
    "MatmulAllReduce": (0, 4),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("type_", COUNTS)
@pytest.mark.parametrize("more", [True, False])
def test_one_collective_more_or_fewer_on_two_ranks(type_: str, fused: bool, more: bool) -> None:
    count = COUNTS[type_][fused]
    graph = sound("prefill", FUSED if fused else Optimizations.all(), ranks=2)
    if more:
        graph.op(type_, [HIDDEN], HIDDEN)
    elif count:
        graph.without(type_)
        if type_ == "MatmulAllReduce":
            graph.op("MatMulV2", [PROMPT, WEIGHT], PROMPT)  # so that the number of products is as before
    found = count + 1 if more else count - 1
    expected = [f"collectives: {found} {type_}, expected {count} for 2 ranks and 3 layers"] if more or count else []
    assert graph.problems() == expected


@pytest.mark.parametrize("mask", ["Less", "GreaterEqual", "LogicalOr", "MaskedFill", "Cos"])
def test_one_mask_more_than_a_cut_embedding_needs(mask: str) -> None:
    graph = sound(ranks=2)
    graph.op(mask, [HIDDEN], HIDDEN)
    (problem,) = graph.problems()
    assert f"({mask}): masks and angles" in problem


ALLOWED: dict[str, Change] = {
    "part_of_a_cache_is_read": lambda graph: graph.op("Slice", [value(BATCH, 63, 2, 4, origin="cache")], HIDDEN),
    "cache_is_read_by_what_copies_nothing": lambda graph: graph.op("Relu", [CACHE], CACHE),
    "activation_of_its_size_is_copied": lambda graph: graph.op("TensorMove", [value(BATCH, 64, 2, 4)], HIDDEN),
    "vector_of_weights_is_cast": lambda graph: graph.op("Cast", [value(8, origin="weight")], HIDDEN),
    "activation_is_cast": lambda graph: graph.op("Cast", [HIDDEN], HIDDEN),
    "constants_are_gathered": lambda graph: graph.op("GatherV2", [value(8, origin="constant")], HIDDEN),
    "product_without_weight": lambda graph: graph.op("MatMul", [HIDDEN, HIDDEN], LOGITS),
    "weight_is_added": lambda graph: graph.op("Add", [HIDDEN, WEIGHT], HIDDEN),
}


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_is_no_fault(change: Change) -> None:
    graph = sound()
    change(graph)
    assert graph.problems() == []


BEFORE: dict[str, tuple[str, Phase]] = {
    # fault -> the last step and the phase in which its invariant does not apply
    "kv_in_place-assign": ("fixed_kv_cache", "decode"),
    "head_on_last_token-two_heads": ("add_rms_norm", "decode"),
    "nothing_repeated_in_layers-one_table_more": ("fixed_kv_cache", "decode"),
    "live_attention-no_lengths": ("fused_qkv", "decode"),
    "one_rotary_operator-one_more": ("last_layer", "decode"),
    "plain_products-three_dimensions": ("one_rotary", "decode"),
}


@pytest.mark.parametrize("fault", BEFORE)
def test_each_invariant_begins_with_its_switch(fault: str) -> None:
    step, phase = BEFORE[fault]
    first = list(LADDER)[list(LADDER).index(step) + 1]
    for last, problems in ((step, 0), (first, 1)):
        graph = sound(phase, Optimizations.up_to(last))
        FAULTS[fault][0](graph)
        assert len(graph.problems()) == problems, last


def test_lengths_are_asked_of_decode_alone() -> None:
    graph = sound("prefill")
    graph.op("IncreFlashAttention", [HIDDEN, CACHE, CACHE], HIDDEN)
    assert graph.problems() == []


ROWS = {
    "of_all_positions": (HIDDEN, PROMPT, 1, "expected 9 of 20 and the others of 2"),
    "of_one_position_fewer": (PROMPT, HIDDEN, -1, "expected 9 of 20 and the others of 2"),
    "of_another_number": (HIDDEN, value(BATCH, 3, 8), 0, "{20: 9, 2: 7, 6: 1}"),
}


@pytest.mark.parametrize("fault", ROWS)
def test_products_of_the_last_layer_have_the_kept_rows(fault: str) -> None:
    was, becomes, more, message = ROWS[fault]
    graph = sound("prefill")
    index = next(i for i in reversed(graph.of_type("MatMul")) if graph.ops[i].outputs == (was,))
    graph.ops[index] = replace(graph.ops[index], outputs=(becomes,))
    (problem,) = graph.problems()
    assert problem.startswith("last_layer_on_kept_positions: products by rows")
    assert message in problem
    assert f"20: {9 + more}" in problem


@pytest.mark.parametrize(("rows", "problems"), [((80, 8), 0), ((80, 80), 1), ((80, 16), 1), ((8, 8), 1)])
def test_grouped_products_of_the_last_layer_have_the_kept_rows(rows: tuple[int, int], problems: int) -> None:
    """Four experts per token: of 20 tokens, and in the last layer of 2."""
    graph = sound("prefill")
    for count in rows:
        for _ in range(2):
            graph.op("GroupedMatmul", [value(count, 8), value(4, 8, 16)], value(count, 16))
    assert sum(problem.startswith("last_layer_on_kept") for problem in graph.problems()) == problems


def test_a_graph_that_writes_no_cache_says_so_once() -> None:
    graph = sound(optimizations=APART)
    while graph.of_type("Scatter"):
        graph.without("Scatter")
    graph.nodes = [node for node in graph.nodes if node.type != "Scatter"]
    assert graph.problems() == ["kv_in_place: 0 Scatter nodes, expected 6: one for k and one for v per layer"]


@pytest.mark.parametrize(
    ("type_", "shape", "on_host", "wrong"),
    [
        ("Data", (2, -1), False, True),
        ("RefData", (-1,), False, True),
        ("Data", (-1,), True, False),  # the live lengths are on the host
        ("Data", (2, 0), False, False),
        ("Data", (), False, False),
        ("Data", (1,), False, False),
        ("Cast", (-1,), False, False),
    ],
)
def test_inputs_have_a_fixed_shape(type_: str, shape: tuple[int, ...], on_host: bool, wrong: bool) -> None:
    graph = Written()
    graph.node("Data", attributes={"index": 0}, shapes=((4,),))
    node = graph.node(type_, attributes={"index": 1}, shapes=(shape,))
    host = frozenset({1}) if on_host else frozenset()
    lowered = Lowered("decode", BATCH, 10, LAYERS, graph.nodes, frozenset(), host)
    assert [node.name in problem for problem in static_inputs(lowered)] == [True] * wrong
    if wrong:
        expected = [
            f"static_inputs: input {node.name} has the shape {shape}, where -1 may change: mark_static is missing"
        ]
        assert invariants.problems(lowered, Optimizations.all(), VOCABULARY) == expected
