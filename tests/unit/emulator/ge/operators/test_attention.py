"""The fused operators against the catalogue's float64 goldens, as torchair lowers ``torch.ops.npu.X``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchair
from torchair.configs.compiler_config import CompilerConfig

from qwen2_npu import ops
from qwen2_npu.conformance.operators import CATALOGUE
from qwen2_npu.conformance.operators.check import find_problems, operator_of
from qwen2_npu.conformance.operators.record import OperatorRecord, Sample
from qwen2_npu.emulator.ge import graph

LOWERED = {
    "npu_prompt_flash_attention": "PromptFlashAttention",
    "npu_incre_flash_attention": "IncreFlashAttention",
    "npu_fused_infer_attention_score": "FusedInferAttentionScore",
    "npu_rms_norm": "RmsNorm",
    "npu_add_rms_norm": "AddRmsNorm",
    "npu_apply_rotary_pos_emb": "ApplyRotaryPosEmb",
    "npu_rotary_mul": "RotaryMul",
    "scatter_update": "Scatter",
    "scatter_update_": "Scatter",
    "npu_swiglu": "SwiGlu",
    "npu_mm_all_reduce_base": "MatmulAllReduce",
    "npu_moe_gating_top_k_softmax": "MoeGatingTopKSoftmax",
    "npu_moe_init_routing_v2": "MoeInitRoutingV3",
    "npu_grouped_matmul": "GroupedMatmul",
    "npu_moe_finalize_routing": "MoeFinalizeRoutingV2",
}
"""Operator of the catalogue -> the GE operator it is lowered to."""

LOWERED_OTHERWISE = {
    ("npu_moe_finalize_routing", "everything_by_column"): "MoeFinalizeRouting",
    ("npu_moe_finalize_routing", "one_skip_by_column"): "MoeFinalizeRouting",
}
"""The same for single samples: the older operator, where all that it requires is given."""

TESTED = {*LOWERED.values(), *LOWERED_OTHERWISE.values()}

NOT_LOWERED = {
    ("npu_moe_init_routing_v2", "default_range"): "torchair's converter fails without active_expert_range",
}
"""Samples that run eagerly alone, and why."""

NO_NODE = {"no_rows": "torchair makes results without elements constants of the graph"}
"""Sample -> why its graph lacks the operator. Every other sample of the catalogue is lowered to it."""


@pytest.fixture(scope="module")
def backend() -> Any:
    return torchair.get_npu_backend(compiler_config=CompilerConfig())


def samples() -> list[Any]:
    """All of the catalogue; the first sample of an operator in the fast lane, the others in the slow one."""
    return [
        pytest.param(
            record,
            sample,
            dtype,
            id=f"{name}-{sample.name}-{dtype}",
            marks=[] if (index, dtype) == (0, record.dtypes_on("emulated")[0]) else [pytest.mark.slow],
        )
        for name, record in CATALOGUE.items()
        for index, sample in enumerate(record.samples)
        for dtype in record.dtypes_on("emulated")
        if not record.skip(sample.name, dtype, "emulated")
    ]


@pytest.mark.parametrize(("record", "sample", "dtype"), samples())
def test_the_lowered_operator_agrees_with_its_golden(
    record: OperatorRecord, sample: Sample, dtype: str, backend: Any
) -> None:
    run, types = compiled(operator_of(record.name), backend)
    in_graph = dataclasses.replace(record, writes=record.graph_writes)
    if (record.name, sample.name) in NOT_LOWERED:
        with pytest.raises(Exception, match="must assign iterable"):
            find_problems(in_graph, sample.parameters, dtype, "npu", sample.seed, implementation=run)
        return
    problems = find_problems(in_graph, sample.parameters, dtype, "npu", sample.seed, implementation=run)
    assert problems == []
    expected = LOWERED_OTHERWISE.get((record.name, sample.name), LOWERED[record.name])
    assert expected in types or sample.name in NO_NODE


def test_every_operator_of_the_catalogue_is_lowered() -> None:
    assert LOWERED.keys() == CATALOGUE.keys()


def test_a_golden_sees_a_wrong_operator(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    record = CATALOGUE["npu_swiglu"]
    monkeypatch.setitem(ops.kernels, "npu_swiglu", lambda x, dim: x.chunk(2, dim)[0] * x.chunk(2, dim)[1])
    run, _ = compiled(operator_of(record.name), backend)
    sample = record.samples[0]
    assert find_problems(record, sample.parameters, "float32", "npu", sample.seed, implementation=run)


def compiled(operator: Callable[..., Any], backend: Any) -> tuple[Callable[..., Any], set[str]]:
    """``operator`` as a GE graph of its own, and the types of that graph's nodes."""
    torch._dynamo.reset()
    types: set[str] = set()

    def note(name: str, ge_graph: Any, options: dict[str, str]) -> None:
        types.update(op.type for op in ge_graph.op)

    def run(**arguments: Any) -> Any:
        graph.loaded.append(note)
        try:
            return torch.compile(lambda: operator(**arguments), backend=backend, fullgraph=True, dynamic=False)()
        finally:
            graph.loaded.remove(note)

    return run, types
