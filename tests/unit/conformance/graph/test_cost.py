"""Costs against numbers worked out by hand from the shapes."""

from __future__ import annotations

import json
import math
from itertools import combinations, product
from typing import Any

import pytest
import torch

from qwen2_npu.conformance.graph import cost as rules
from qwen2_npu.conformance.graph.census import Census, take
from qwen2_npu.conformance.graph.cost import Cost, cost_of, experts_read, graph_cost, total
from qwen2_npu.conformance.graph.shapes import GraphValue, Operation
from qwen2_npu.emulator.ge.proto import Node
from tests.unit.conformance.graph.build import Graph, value

BF16 = 2


def test_a_product_reads_its_weight_once():
    graph = Graph()
    x, w = graph.data((4, 8)), graph.data((16, 8), weight=True)
    transposed = graph.op("Transpose", "x perm", w, graph.const(1, 0))
    out = graph.op("MatMul", "x1 x2", x, transposed)
    cost = graph_cost(graph.lowered(out))
    assert cost == Cost(
        flops=2 * 4 * 8 * 16, weight_bytes=16 * 8 * BF16, activation_bytes=(4 * 8 + 4 * 16) * BF16, launches=1
    )


def test_views_cost_nothing():
    graph = Graph()
    x = graph.data((4, 8))
    reshaped = graph.op("Reshape", "x shape", x, graph.const(8, 4))
    assert graph_cost(graph.lowered(graph.op("Unsqueeze", "x", reshaped, axes=[0]))) == Cost()


def test_an_element_wise_operator_moves_everything_once():
    graph = Graph()
    a, b = graph.data((4, 8)), graph.data((4, 8))
    assert graph_cost(graph.lowered(graph.op("Add", "x1 x2", a, b))) == Cost(
        flops=32, activation_bytes=3 * 32 * BF16, launches=1
    )


def test_a_gather_reads_the_rows_it_takes():
    graph = Graph()
    table, ids = graph.data((1000, 8), weight=True), graph.data((4, 1), torch.int64)
    cost = graph_cost(graph.lowered(graph.op("GatherV2", "x indices axis", table, ids, graph.const(0))))
    assert cost.weight_bytes == 4 * 8 * BF16
    assert cost.activation_bytes == 4 * 8 + 8 + 4 * 8 * BF16  # the ids, the axis, the rows


SLOTS, KV_HEADS, HEADS, DIM = 64, 2, 4, 16
IFA = "query key0 value0 atten_mask actual_seq_lengths"


def attention(lengths: bool, live: int = 10) -> Cost:
    graph = Graph(batch=2, live=live)
    caches = [graph.data((2, SLOTS, KV_HEADS, DIM)) for _ in range(2)]
    index, new = graph.data((2,), torch.int64), graph.data((2, 1, KV_HEADS, DIM))
    written = [
        graph.in_place("Scatter", "var indices updates", cache, index, new, reduce="update", axis=1) for cache in caches
    ]
    query = graph.data((2, 1, HEADS, DIM))
    given = graph.host((2,)) if lengths else None
    out = graph.op(
        "IncreFlashAttention", IFA, query, *written, None, given, num_heads=HEADS, num_key_value_heads=KV_HEADS,
        input_layout="BSND", scale_value=0.25,
    )  # fmt: skip
    return graph_cost(graph.lowered(out))


def cache_bytes(slots: int) -> int:
    return 2 * 2 * slots * KV_HEADS * DIM * BF16


def test_a_write_in_place_and_attention_are_charged_the_live_slots():
    cost = attention(lengths=True, live=10)
    assert cost.cache_bytes == cache_bytes(10) + cache_bytes(1)  # read, and the new token written
    assert cost.flops == 2 * 4 * HEADS * DIM * 10


def test_attention_without_lengths_is_charged_the_whole_cache():
    assert attention(lengths=False).cache_bytes == cache_bytes(SLOTS) + cache_bytes(1)


def test_causal_prompt_attention_computes_half():
    def flops(**attributes):
        graph = Graph()
        q, k, v = graph.data((1, 8, HEADS, DIM)), graph.data((1, 8, 2, DIM)), graph.data((1, 8, 2, DIM))
        out = graph.op(
            "PromptFlashAttention", "query key value", q, k, v, num_heads=HEADS, num_key_value_heads=2,
            input_layout="BSND", **attributes,
        )  # fmt: skip
        return graph_cost(graph.lowered(out)).flops

    assert flops(sparse_mode=0, next_tokens=2147483647) == 4 * HEADS * DIM * 8 * 8
    assert flops(sparse_mode=0, next_tokens=0) == 4 * HEADS * DIM * 8 * 9 // 2


COLLECTIVES = {
    # (4, 8) of bf16 on four cards: GE operator -> attributes, bytes of the result, bytes each card sends.
    "HcomAllReduce": ({"reduction": "sum"}, 64, 2 * 3 * 64 // 4),
    "HcomAllGather": ({"rank_size": 4}, 4 * 64, 3 * 64),
    "HcomReduceScatter": ({"reduction": "sum", "rank_size": 4}, 16, 3 * 16),
    "HcomBroadcast": ({"root_rank": 0}, 64, 64),
}


@pytest.mark.parametrize("operator", COLLECTIVES)
def test_a_collective_moves_its_tensor_once_and_sends_by_the_ring(operator):
    attributes, result, sent = COLLECTIVES[operator]
    graph = Graph(ranks=4)
    names = "x0" if operator == "HcomBroadcast" else "x"
    out = graph.op(operator, names, graph.data((4, 8)), group="nobody", **attributes)
    assert graph_cost(graph.lowered(out)) == Cost(activation_bytes=64 + result, launches=1, link_bytes=sent)


@pytest.mark.parametrize("operator", ["HcomAllReduce", "HcomBroadcast"])
def test_a_collective_of_one_card_sends_nothing(operator):
    attributes, _, _ = COLLECTIVES[operator]
    graph = Graph()
    names = "x0" if operator == "HcomBroadcast" else "x"
    assert not graph_cost(
        graph.lowered(graph.op(operator, names, graph.data((4, 8)), group="nobody", **attributes))
    ).link_bytes


@pytest.mark.parametrize(("rows", "touched"), [(6, 6), (40, 32)])
def test_a_grouped_product_reads_no_more_weights_than_it_has_rows(rows, touched):
    graph = Graph()
    x, weight = graph.data((rows, 8)), graph.data((32, 8, 16), weight=True)
    sizes = graph.data((32,), torch.int64)
    names = "x0 weight0 bias0 scale0 offset0 antiquant_scale0 antiquant_offset0 group_list per_token_scale"
    options = {"split_item": 2, "group_type": 0, "group_list_type": 1}
    out = graph.op("GroupedMatmul", names, x, weight, None, None, None, None, None, sizes, None, **options)
    assert graph_cost(graph.lowered(out)) == Cost(
        flops=2 * rows * 8 * 16,
        weight_bytes=touched * 8 * 16 * BF16,
        activation_bytes=rows * (8 + 16) * BF16 + 32 * 8,
        launches=1,
    )


@pytest.mark.parametrize(("experts", "per_token", "tokens"), [(5, 2, 1), (5, 2, 3), (4, 3, 2), (6, 6, 2)])
def test_experts_read_of_every_choice_there_is(experts, per_token, tokens):
    sets = list(combinations(range(experts), per_token))
    read = [len(set().union(*choice)) for choice in product(sets, repeat=tokens)]
    found = experts_read(experts, per_token, tokens)
    assert (found.least, found.most) == (min(read), max(read))
    assert found.expected == pytest.approx(sum(read) / len(read))


def test_experts_read_of_the_published_mixture():
    found = {tokens: experts_read(64, 8, tokens) for tokens in (1, 4, 32, 4096)}
    assert [(read.least, read.most) for read in found.values()] == [(8, 8), (8, 32), (8, 64), (8, 64)]
    assert [round(read.expected, 2) for read in found.values()] == [8.0, 26.48, 63.11, 64.0]


def product_and_all_reduce(ranks: int) -> Census:
    graph = Graph(ranks=ranks)
    x, w, x3 = graph.data((2, 3, 8)), graph.data((16, 8), weight=True), graph.data((2, 3, 16))
    transposed = graph.op("Transpose", "x perm", w, graph.const(1, 0))
    out = graph.op("MatmulAllReduce", "x1 x2 bias x3", x, transposed, None, x3, group="nobody", reduce_op="sum")
    return take(graph.lowered(out))


def test_a_product_with_its_all_reduce_is_one_launch():
    census = product_and_all_reduce(ranks=4)
    assert census.operators == {"MatmulAllReduce": 1}
    assert census.cost == Cost(
        flops=2 * 6 * 8 * 16,
        weight_bytes=16 * 8 * BF16,
        activation_bytes=(6 * 8 + 2 * 6 * 16) * BF16,
        launches=1,
        link_bytes=2 * 3 * 6 * 16 * BF16 // 4,
    )


def test_a_census_holds_link_bytes_where_there_are_any():
    alone, shared = (product_and_all_reduce(ranks) for ranks in (1, 2))
    assert "link_bytes" not in json.dumps(alone.to_json())
    assert shared.to_json()["costs"]["MatmulAllReduce"]["link_bytes"] == 6 * 16 * BF16
    assert [Census.from_json(census.to_json()) for census in (alone, shared)] == [alone, shared]


# ---- every rule alone, on operators written by hand -----------------------------------------------------------------
def cost(type_: str, given: list[GraphValue | None], *outputs: GraphValue, ranks: int = 1, live: int | None = None,
         names: tuple[str, ...] = (), **attributes: Any) -> Cost:  # fmt: skip
    node = Node("one", type_, (), names, (), {}, attributes, (), ())
    return cost_of(Operation(node, tuple(given), outputs, live, ranks))


X, Y, W, C, K = (
    value(2, 3),
    value(5),
    value(7, origin="weight"),
    value(11, origin="cache"),
    value(13, origin="constant"),
)
MOVES = (
    "TensorMove", "Identity", "Transpose", "SplitV", "Split", "SplitD", "ConcatV2", "ConcatD", "Pack", "BroadcastTo",
    "Expand", "Fill", "Slice", "StridedSliceV2", "Cast", "ZerosLike", "Assign", "Tile", "Pad", "PadV3",
    "MoeInitRoutingV3",
)  # fmt: skip


def test_the_table_holds_what_it_held() -> None:
    """One that is gone from a list is charged as element-wise, and reads as a fused operator where it was none."""
    products = {"MatMul", "MatMulV2", "MatMulV3", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "MatmulAllReduce"}
    products |= {"GroupedMatmul", "WeightQuantBatchMatmulV2", "QuantBatchMatmulV3"}
    collectives = {"MatmulAllReduce", "HcomAllReduce", "HcomAllGather", "HcomReduceScatter", "HcomBroadcast"}
    assert set(MOVES) == rules.MOVEMENT
    assert products == rules.PRODUCTS
    assert collectives == rules.COLLECTIVES
    assert {"IncreFlashAttention", "PromptFlashAttention", "FusedInferAttentionScore"} == rules.ATTENTION
    assert {"GatherV2", "IndexByTensor", "GatherElements"} == rules.GATHERS
    assert products | collectives | rules.GATHERS | set(MOVES) < set(rules.RULES)


@pytest.mark.parametrize("type_", MOVES)
def test_a_move_computes_nothing_and_moves_everything_once(type_: str) -> None:
    everything = Cost(0, weight_bytes=14, cache_bytes=22, activation_bytes=26 + 12 + 10, launches=1)
    assert cost(type_, [C, W, None, K], X, Y) == everything


def test_another_operator_computes_each_of_its_results_once() -> None:
    everything = Cost(flops=6 + 5, weight_bytes=14, cache_bytes=22, activation_bytes=26 + 12 + 10, launches=1)
    assert cost("Add", [C, W, None, K], X, Y) == everything
    assert cost("Add", [value(4, dtype=torch.float32)], value(4, dtype=torch.bool)).activation_bytes == 16 + 4


@pytest.mark.parametrize("type_", ["MatMul", "MatMulV2", "MatMulV3", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"])
def test_a_product_multiplies_along_its_inner_size(type_: str) -> None:
    bias = value(8, origin="weight")
    expected = Cost(2 * 4 * 8 * 16, weight_bytes=2 * (16 * 8 + 8), activation_bytes=2 * (4 * 16 + 4 * 8), launches=1)
    weight, out = value(16, 8, origin="weight"), value(4, 8)
    assert cost(type_, [value(4, 16), weight, bias], out) == expected
    for name in ("transpose_x1", "adj_x1"):
        assert cost(type_, [value(16, 4), weight, bias], out, **{name: True}) == expected
        assert cost(type_, [value(4, 16), weight, bias], out, **{name: False}) == expected


@pytest.mark.parametrize("type_", ["GatherV2", "IndexByTensor", "GatherElements"])
def test_every_gather_reads_the_rows_it_takes_and_its_indices(type_: str) -> None:
    table = value(1000, 8, origin="weight", dtype=torch.float32)
    found = cost(type_, [table, value(3, dtype=torch.int64), K], value(3, 8))
    assert found == Cost(0, weight_bytes=3 * 8 * 4, activation_bytes=3 * 8 + 26 + 3 * 8 * 2, launches=1)


def test_a_scatter_writes_its_updates_alone() -> None:
    found = cost("Scatter", [value(4, 64, 8, origin="cache"), value(4, dtype=torch.int64), value(4, 1, 8)], C)
    assert found == Cost(0, cache_bytes=4 * 8 * 2, activation_bytes=4 * 8 + 4 * 8 * 2, launches=1)


@pytest.mark.parametrize("live", [None, 9])
def test_incremental_attention_reads_query_live_slots_and_mask(live: int | None) -> None:
    cache = value(2, 64, 2, 16, origin="cache")
    mask = value(2, 64, dtype=torch.bool)
    found = cost("IncreFlashAttention", [value(2, 1, 4, 16), cache, cache, mask, K, W], value(2, 1, 4, 16), live=live)
    slots = 2 * 64 if live is None else 9
    assert found == Cost(
        flops=4 * 4 * 16 * slots,
        weight_bytes=14,
        cache_bytes=2 * slots * 2 * 16 * 2,
        activation_bytes=2 * 4 * 16 * 2 + 2 * 64 + 2 * 4 * 16 * 2,
        launches=1,
    )


@pytest.mark.parametrize(
    ("attributes", "causal"),
    [
        ({}, False),
        ({"sparse_mode": 0, "next_tokens": 1}, False),
        ({"sparse_mode": 1}, False),
        ({"sparse_mode": 2}, True),
        ({"sparse_mode": 3}, True),
        ({"sparse_mode": 4}, False),
        ({"sparse_mode": 0, "next_tokens": 0}, True),
        ({"sparse_mode": 2, "next_tokens": 7}, True),
    ],
)
def test_prompt_attention_reads_everything_once_and_computes_half_where_causal(
    attributes: dict[str, int], causal: bool
) -> None:
    query, key = value(3, 8, 4, 16), value(3, 8, 2, 16)
    pairs = 8 * 9 // 2 if causal else 8 * 8
    assert cost("PromptFlashAttention", [query, key, key, None, W], query, **attributes) == Cost(
        flops=4 * 3 * 4 * 16 * pairs,
        weight_bytes=14,
        activation_bytes=2 * (2 * 3 * 8 * 4 * 16 + 2 * 3 * 8 * 2 * 16),
        launches=1,
    )


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (value(8, 8, dtype=torch.bool), 64),
        (value(1, 65, dtype=torch.bool), 64),  # larger than the pairs it stands for
        (value(2048, 2048, dtype=torch.bool), 64),
        (value(1, 63, dtype=torch.bool), 63),
        (value(65, dtype=torch.int8), 65),  # no mask
        (value(64, dtype=torch.bool, origin="constant"), 64),
    ],
)
def test_of_a_compressed_mask_the_prompt_s_part_is_read(mask: GraphValue, seen: int) -> None:
    query = value(1, 8, 4, 16)
    without = cost("PromptFlashAttention", [query, query, query], query)
    found = cost("PromptFlashAttention", [query, query, query, mask], query)
    assert found == without + Cost(activation_bytes=seen)


@pytest.mark.parametrize("operator", [*COLLECTIVES, "MatmulAllReduce"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_is_sent_is_rounded_up_and_nothing_is_sent_alone(operator: str, ranks: int) -> None:
    out = value(3)
    factor = {"HcomAllReduce": 2, "MatmulAllReduce": 2, "HcomAllGather": 1, "HcomReduceScatter": 1}.get(operator)
    given = [value(1, 3), value(3, 3, origin="weight")] if operator == "MatmulAllReduce" else [out]
    found = cost(operator, list(given), out, ranks=ranks)
    expected = 6 * (ranks > 1) if factor is None else math.ceil(factor * (ranks - 1) * 6 / ranks)
    assert found.link_bytes == expected
    assert found.flops == (2 * 3 * 3 if operator == "MatmulAllReduce" else 0)


def test_all_given_and_all_made_values_of_a_collective_are_sent() -> None:
    assert cost("HcomReduceScatter", [value(4), value(6)], value(2), ranks=2).link_bytes == 10
    assert cost("HcomAllReduce", [value(4)], value(4), value(6), ranks=2).link_bytes == 20


def test_all_bytes_are_counted_and_link_bytes_written_where_there_are_any() -> None:
    whole = Cost(1, 2, 4, 8, 16, 32)
    assert whole.nbytes == 2 + 4 + 8
    assert whole + whole == Cost(2, 4, 8, 16, 32, 64)
    assert whole.to_json() == {
        "flops": 1, "weight_bytes": 2, "cache_bytes": 4, "activation_bytes": 8, "launches": 16, "link_bytes": 32,
    }  # fmt: skip
    assert Cost().to_json() == dict.fromkeys(
        ("flops", "weight_bytes", "cache_bytes", "activation_bytes", "launches"), 0
    )


def test_a_view_costs_nothing_and_a_sum_is_of_all_operators() -> None:
    assert cost("Reshape", [X], X) == Cost()
    assert cost("Transpose", [W], W) == Cost()
    node = Node("one", "Relu", (), (), (), {}, {}, (), ())
    ops = [Operation(node, (X,), (X,)) for _ in range(3)]
    assert total(ops) == Cost(flops=18, activation_bytes=72, launches=3)
    assert total([]) == Cost()


# ---- 8-bit weights --------------------------------------------------------------------------------------------------
def test_products_of_8_bit_weights_read_a_byte_each() -> None:
    weight, scale = value(3, 5, dtype=torch.int8, origin="weight"), value(5, origin="weight")
    x, out = value(2, 3), value(2, 5)
    found = cost("WeightQuantBatchMatmulV2", [x, weight, scale], out)
    assert found == Cost(flops=2 * 2 * 3 * 5, weight_bytes=15 + 10, activation_bytes=12 + 20, launches=1)
    rows, token = value(2, 3, dtype=torch.int8), value(2, dtype=torch.float32)
    wide = value(5, dtype=torch.float32, origin="weight")
    found = cost("QuantBatchMatmulV3", [rows, weight, wide, token], out)
    assert found == Cost(flops=2 * 2 * 3 * 5, weight_bytes=15 + 20, activation_bytes=6 + 8 + 20, launches=1)
    assert {"WeightQuantBatchMatmulV2", "QuantBatchMatmulV3"} <= rules.PRODUCTS


QUANTISING = {
    # operator -> what it reads and writes of (2, 8), and its FLOPs
    "DynamicQuant": ([(2, 8)], [(2, 8), (2,)], 16),
    "AddRmsNormDynamicQuant": ([(2, 8), (2, 8), (8,)], [(2, 8), (0,), (2, 8), (2,), (0,)], 32),
    "DequantSwigluQuant": ([(2, 16), (16,), (2,)], [(2, 8), (2,)], 16),
}


@pytest.mark.parametrize("operator", QUANTISING)
def test_quantising_moves_everything_once(operator: str) -> None:
    given, made, flops = QUANTISING[operator]
    found = cost(operator, [value(*shape) for shape in given], *(value(*shape) for shape in made))
    elements = sum(math.prod(shape) for shape in (*given, *made))
    assert found == Cost(flops=flops, activation_bytes=2 * elements, launches=1)
    assert operator in rules.RULES


@pytest.mark.parametrize("tokens", [1, 8])
def test_one_attention_operator_costs_what_the_two_cost(tokens: int) -> None:
    query, cache = value(2, tokens, 4, 16), value(2, 64, 2, 16, origin="cache")
    options = {"live": 20} if tokens == 1 else {"sparse_mode": 2}
    other = "IncreFlashAttention" if tokens == 1 else "PromptFlashAttention"
    found, expected = (
        cost(name, [query, cache, cache], query, **options) for name in ("FusedInferAttentionScore", other)
    )
    assert found == expected
    assert found.cache_bytes == (2 * 20 * 2 * 16 * 2 if tokens == 1 else 2 * 2 * 64 * 2 * 16 * 2)
