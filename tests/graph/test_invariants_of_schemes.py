"""Rules of 8-bit weights, called one by one: the right graph passes, what differs by the least does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.conformance.graph.shapes import GraphValue, Operation
from tests.graph import invariants
from tests.graph.test_invariants_of_steps import BATCH, HEAD, HIDDEN, LAYERS, WEIGHT, graph, named, op, value

INTEGERS = value(8, 16, origin="weight", dtype=torch.int8)
SCALES = value(1, 16, origin="weight")
W8A8 = Optimizations.up_to("w8a8")
PRODUCT = {"w8a16": "WeightQuantBatchMatmulV2", "w8a8": "QuantBatchMatmulV3"}
GIVEN = {"w8a16": HIDDEN, "w8a8": value(BATCH, 8, dtype=torch.int8)}


@pytest.mark.parametrize("scheme", PRODUCT)
@pytest.mark.parametrize("type_", ["BatchMatMulV2", "MatMul", *PRODUCT.values()])
def test_eight_bit_weights_are_read_by_the_operator_of_their_scheme(scheme: str, type_: str) -> None:
    made = graph([op(type_, GIVEN[scheme], INTEGERS, SCALES), HEAD], Optimizations.up_to(scheme))
    expected = f"{type_.lower()} ({type_}) multiplies with a weight, expected {PRODUCT[scheme]}"
    problems = [problem for problem in invariants.eight_bit_weights(made) if "given activations" not in problem]
    assert problems == [expected] * (type_ != PRODUCT[scheme])


@pytest.mark.parametrize("scheme", PRODUCT)
def test_eight_bit_weights_are_not_those_of_any_head(scheme: str) -> None:
    heads = [named(HEAD, "first"), named(HEAD, "second")]
    assert list(invariants.eight_bit_weights(graph(heads, Optimizations.up_to(scheme)))) == []
    heads[1] = replace(heads[1], inputs=(HIDDEN, INTEGERS))
    (problem,) = invariants.eight_bit_weights(graph(heads, Optimizations.up_to(scheme)))
    assert problem == f"second (MatMul) reads a weight (8, 16) of torch.int8 with {scheme}"


FLOATS: dict[str, tuple[GraphValue, bool]] = {
    # floating-point numbers beside the weight of integers, and whether they are a weight
    "two_by_two": (value(2, 2, origin="weight"), True),
    "two_rows": (value(2, 16, origin="weight"), True),
    "two_columns": (value(16, 2, origin="weight"), True),
    "row": (value(1, 16, origin="weight"), False),
    "column": (value(16, 1, origin="weight"), False),
    "vector": (value(16, origin="weight"), False),
    "activation": (value(2, 2), False),
}


@pytest.mark.parametrize("case", FLOATS)
@pytest.mark.parametrize("scheme", PRODUCT)
def test_eight_bit_weights_are_wide_and_scales_are_not(scheme: str, case: str) -> None:
    second, wide = FLOATS[case]
    ops = [op(PRODUCT[scheme], GIVEN[scheme], INTEGERS, second)]
    problems = list(invariants.eight_bit_weights(graph(ops, Optimizations.up_to(scheme))))
    type_ = PRODUCT[scheme]
    expected = f"{type_.lower()} ({type_}) reads a weight {second.shape} of torch.bfloat16 with {scheme}"
    assert problems == [expected] * wide


@pytest.mark.parametrize("given", [HIDDEN, GIVEN["w8a8"]])
def test_eight_bit_weights_have_eight_bit_activations_with_w8a8(given: GraphValue) -> None:
    made = graph([op("QuantBatchMatmulV3", given, INTEGERS, SCALES)], W8A8)
    expected = "quantbatchmatmulv3 (QuantBatchMatmulV3) is given activations of torch.bfloat16"
    assert list(invariants.eight_bit_weights(made)) == [expected] * (given is HIDDEN)


@pytest.mark.parametrize("weight", [WEIGHT, INTEGERS])
def test_eight_bit_weights_come_with_a_scheme_alone(weight: GraphValue) -> None:
    expected = "matmul (MatMul) reads a weight (8, 16) of torch.int8 with ordinary weights"
    found = list(invariants.eight_bit_weights(graph([op("MatMul", HIDDEN, weight)])))
    assert found == [expected] * (weight is INTEGERS)


def quantised(norms: int, apart: int = 0, swiglu: int = 0) -> list[Operation]:
    return (
        [op("AddRmsNormDynamicQuant", HIDDEN)] * norms
        + [op("DynamicQuant", HIDDEN)] * (4 * LAYERS - norms + apart)
        + [op("SwiGlu", HIDDEN)] * swiglu
    )


NORMS: dict[str, tuple[Optimizations, int]] = {
    # steps, and how many norms quantise
    "all": (W8A8, 5),
    "separate": (W8A8.replace(separate_norm_quant=True), 0),
    "no_add_rms_norm": (W8A8.replace(add_rms_norm=False), 0),
}


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_activations_quantised_once_by_all_norms_but_the_first(case: str, more: int) -> None:
    optimizations, count = NORMS[case]
    found = max(count + more, 0)
    problems = list(invariants.activations_quantised_once(graph(quantised(found), optimizations)))
    expected = f"{found} AddRmsNormDynamicQuant in 3 layers: all norms but the first and the last"
    assert problems == [expected] * (found != count)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_activations_quantised_once_counts_all_operators(more: int) -> None:
    problems = list(invariants.activations_quantised_once(graph(quantised(5, apart=more), W8A8)))
    assert problems == [f"activations are quantised {12 + more} times in 3 layers, expected 12"] * (more != 0)


@pytest.mark.parametrize("swiglu", [False, True])
def test_activations_quantised_once_allows_swiglu_where_its_step_is_off(swiglu: bool) -> None:
    optimizations = W8A8 if swiglu else W8A8.replace(swiglu=False, fused_moe=False)
    problems = list(invariants.activations_quantised_once(graph(quantised(5, swiglu=1), optimizations)))
    assert problems == ["1 SwiGlu, expected none: DequantSwigluQuant does its work"] * swiglu
