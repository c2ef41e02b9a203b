"""The installed torchair can lower every operator of the model: converter, meta kernel, schema."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.conformance.graph.census import take
from qwen2_npu.conformance.graph.lowering import DEVICE, Lowered, lower, lower_call
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.emulator.ge.proto import parse
from qwen2_npu.ops import SCHEMAS
from qwen2_npu.optimizations import Optimizations

IN_GRAPHS = sorted(SCHEMAS.keys() - {"scatter_update_", "npu_scatter_pa_kv_cache"})
"""Operators that write in place are functionalised: graphs hold their other forms."""


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_has_a_converter(name: str) -> None:
    import torchair  # noqa: F401 - registers the converters
    from torchair._ge_concrete_graph.fx2ge_converter import _get_converter

    assert _get_converter(getattr(torch.ops.npu, name).default) is not None
    assert _get_converter(torch.ops.npu.npu_format_cast_.default) is None, "this check could not fail"


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_has_a_meta_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta")


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema_is_the_snapshot(name: str) -> None:
    """The live wheel against what this project was written for."""
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{SCHEMAS[name]}"


def test_a_row_parallel_layer_lowers_to_one_kernel() -> None:
    """The product of nn.Linear's own weight and its all-reduce: one launch, and no copy of the weight."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(16, 8, dtype=torch.bfloat16, device=DEVICE), requires_grad=False)
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, device=DEVICE)

        def layer(x: torch.Tensor) -> torch.Tensor:
            return torch.ops.npu.npu_mm_all_reduce_base(x, weight.t(), "a_group")

        raw = lower_call(layer, (x,), dynamic=False)
    nodes = parse(raw.proto)
    (product,) = (node for node in nodes if node.type == "MatmulAllReduce")
    assert (product.attributes["group"], product.attributes["reduce_op"]) == ("a_group", "sum")
    weights = frozenset(index for index, frozen in enumerate(raw.parameters) if frozen)
    census = take(Lowered("prefill", 2, 3, 1, nodes, weights, frozenset(), ranks=2))
    assert census.operators == {"MatmulAllReduce": 1}
    assert (census.cost.flops, census.cost.weight_bytes, census.cost.link_bytes) == (2 * 6 * 8 * 16, 256, 192)


def test_one_attention_operator_is_charged_what_the_two_are() -> None:
    """fused_infer_attention is told the live length as well, in one layer of each phase."""
    config, every = SIZES["1.5B"].config(layers=1), Optimizations.up_to("swiglu")
    for phase, other in (("decode", "IncreFlashAttention"), ("prefill", "PromptFlashAttention")):
        two, one = (
            take(lower(config, phase, 2, 256, switched, prompt=128)).costs
            for switched in (every, every.replace(fused_infer_attention=True))
        )
        expected, found = two[other], one["FusedInferAttentionScore"]
        assert (found.flops, found.cache_bytes, found.launches) == (expected.flops, expected.cache_bytes, 1)
        # It gives the logarithms of its sums, too, where they are asked for; here it is one number.
        assert 0 <= found.activation_bytes - expected.activation_bytes <= 4
