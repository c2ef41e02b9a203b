"""Costs of operators with lists of inputs, or several caches: grouped products, experts' sums, paged writes."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.conformance.graph.cost import Cost
from qwen2_npu.conformance.graph.shapes import GraphValue
from tests.unit.conformance.graph import test_cost
from tests.unit.conformance.graph.build import value
from tests.unit.conformance.graph.test_cost import BF16


def cost(type_: str, inputs: dict[str, GraphValue | None], *outputs: GraphValue) -> Cost:
    return test_cost.cost(type_, list(inputs.values()), *outputs, names=tuple(inputs))


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_of_stacked_weights_no_more_are_read_than_there_are_rows(rows: int) -> None:
    x, w, out = value(rows, 8), value(4, 8, 16, origin="weight"), value(rows, 16)
    rest = {"x1": None, "weight1": None, "bias0": None, "group_list": value(4, dtype=torch.int64)}
    found = cost("GroupedMatmul", {"x0": x, "weight0": w, **rest}, out)
    assert found == Cost(
        flops=2 * rows * 8 * 16,
        weight_bytes=min(rows, 4) * 8 * 16 * BF16,
        activation_bytes=rows * (8 + 16) * BF16 + 4 * 8,
        launches=1,
    )


def test_of_weights_in_a_list_all_are_read_each_by_rows_of_its_own() -> None:
    """Of other sizes, and more than ten: the numbers of inputs have two digits."""
    count = 12
    rows = {f"x{i}": value(i + 1, 8) for i in range(count)}
    weights = {f"weight{i}": value(8, 16 + i, origin="weight") for i in range(count)}
    found = cost("GroupedMatmul", {**rows, **weights, "bias0": None}, *(value(i + 1, 16 + i) for i in range(count)))
    assert found == Cost(
        flops=sum(2 * (i + 1) * 8 * (16 + i) for i in range(count)),
        weight_bytes=sum(8 * (16 + i) for i in range(count)) * BF16,
        activation_bytes=sum((i + 1) * (8 + 16 + i) for i in range(count)) * BF16,
        launches=1,
    )


def test_rows_in_a_list_share_weights_that_are_fewer() -> None:
    """The last weight serves the rows that have none of their own; a matrix is no stack."""
    rows = {"x0": value(1, 8), "x1": value(2, 8), "x2": value(3, 8)}
    for weights, wide in (((20,), (20, 20, 20)), ((16, 24), (16, 24, 24))):
        given = {f"weight{i}": value(8, columns, origin="weight") for i, columns in enumerate(weights)}
        found = cost("GroupedMatmul", {**rows, **given})
        assert found.flops == sum(2 * (i + 1) * 8 * columns for i, columns in enumerate(wide))
        assert found.weight_bytes == 8 * sum(weights) * BF16


def test_stacks_in_a_list_are_read_as_they_are() -> None:
    weights = {f"weight{i}": value(4, 8, 16, origin="weight") for i in range(2)}
    found = cost("GroupedMatmul", {"x0": value(1, 8), **weights})
    assert found.weight_bytes == 2 * 4 * 8 * 16 * BF16


@pytest.mark.parametrize("type_", ["MoeFinalizeRouting", "MoeFinalizeRoutingV2"])
def test_the_experts_sum_multiplies_and_adds_each_row_and_moves_everything_once(type_: str) -> None:
    rows, scales, out = value(12, 8), value(4, 3, dtype=torch.float32), value(4, 8)
    found = cost(type_, {"expanded_x": rows, "x1": None, "scales": scales}, out)
    assert found == Cost(flops=2 * 12 * 8, activation_bytes=(12 * 8 + 4 * 8) * BF16 + 4 * 3 * 4, launches=1)


def test_a_paged_write_moves_what_is_new_and_no_more_of_the_caches() -> None:
    """Keys and values of different widths; further inputs are not moved."""
    key, value_ = value(4, 2, 16), value(4, 2, 24)
    caches = value(9, 32, 2, 16, origin="cache"), value(9, 32, 2, 24, origin="cache")
    inputs = {
        "key": key, "key_cache": caches[0], "slot_mapping": value(4, dtype=torch.int32), "value": value_,
        "value_cache": caches[1], "compress_lens": value(1000, dtype=torch.int32),
    }  # fmt: skip
    new = 4 * 2 * (16 + 24) * BF16
    assert cost("ScatterPaKvCache", inputs, *caches) == Cost(cache_bytes=new, activation_bytes=new + 4 * 4, launches=1)
