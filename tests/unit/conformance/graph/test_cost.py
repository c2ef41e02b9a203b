"""Costs against numbers worked out by hand from the shapes."""

from __future__ import annotations

import json
from itertools import combinations, product

import pytest
import torch

from qwen2_npu.conformance.graph.census import Census, take
from qwen2_npu.conformance.graph.cost import Cost, experts_read, graph_cost
from tests.unit.conformance.graph.build import Graph

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
