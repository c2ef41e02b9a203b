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
from qwen2_npu.emulator.ge.operators.table import TABLE
from tests.unit.emulator.ge.operators import argument_faults

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
    "npu_scatter_pa_kv_cache_functional": "ScatterPaKvCache",
    "npu_scatter_pa_kv_cache": "ScatterPaKvCache",
    "npu_swiglu": "SwiGlu",
    "npu_mm_all_reduce_base": "MatmulAllReduce",
    "npu_moe_gating_top_k_softmax": "MoeGatingTopKSoftmax",
    "npu_moe_init_routing_v2": "MoeInitRoutingV3",
    "npu_grouped_matmul": "GroupedMatmul",
    "npu_moe_finalize_routing": "MoeFinalizeRoutingV2",
    "npu_weight_quant_batchmatmul": "WeightQuantBatchMatmulV2",
    "npu_quant_matmul": "QuantBatchMatmulV3",
    "npu_dynamic_quant": "DynamicQuant",
    "npu_add_rms_norm_dynamic_quant": "AddRmsNormDynamicQuant",
    "npu_dequant_swiglu_quant": "DequantSwigluQuant",
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


FAST = {
    "npu_prompt_flash_attention": (
        "no_mask_is_not_causal", "ragged_mode_4", "mode_0_band", "BNSD", "default_scale", "mode_3_wide",
    ),
    "npu_incre_flash_attention": ("regular", "mask_in_cache_coordinates", "BNSD", "default_scale"),
    "npu_fused_infer_attention_score": (
        "prefill_no_mask_is_not_causal", "prefill_ragged_mode_4", "prefill_mode_0_band", "prefill_BNSD",
        "prefill_mode_3_wide", "prefill_default_scale", "prefill_lse", "decode_mask_in_cache_coordinates",
        "inner_precise_1",
    ),
    "npu_rms_norm": ("regular", "tiny_epsilon_1e-5"),
    "npu_add_rms_norm": ("regular", "tiny_epsilon_1e-5"),
    "npu_apply_rotary_pos_emb": ("prefill", "explicit_layout"),
    "scatter_update": ("BNSD_decode", "BSH"),
    "scatter_update_": ("BNSD_decode", "BSH"),
    "npu_scatter_pa_kv_cache_functional": ("decode",),
    "npu_scatter_pa_kv_cache": ("decode",),
    "npu_swiglu": ("regular", "middle"),
    "npu_mm_all_reduce_base": ("regular", "bias_and_x3", "explicit_sum"),
    "npu_moe_gating_top_k_softmax": ("regular", "some_finished"),
    "npu_moe_init_routing_v2": ("regular", "active_ends", "active_scatter", "scatter", "gather"),
    "npu_grouped_matmul": ("regular", "bias", "ends", "lists", "lists_to_one"),
    "npu_moe_finalize_routing": ("regular", "everything", "everything_by_column", "two_skips", "bias", "told_k"),
    "npu_weight_quant_batchmatmul": ("wide_bias", "inner_precise"),
    "npu_dynamic_quant": ("regular", "explicit_type"),
    "npu_quant_matmul": ("regular", "half", "integer_bias"),
    "npu_add_rms_norm_dynamic_quant": ("regular", "tiny_epsilon_1e-5", "explicit"),
    "npu_dequant_swiglu_quant": ("regular", "right", "explicit"),
}  # fmt: skip
"""Operator -> the samples of the fast lane: so many that they see every wrong use of an argument.

Of an operator that is not here it is the first one.
"""

HARMLESS = {
    "npu_fused_infer_attention_score": {"inner_precise ignored"},  # how hardware computes in fp16
    "npu_add_rms_norm": {"x1 and x2 exchanged"},
    "npu_moe_init_routing_v2": {"active_num ignored"},  # what is taken means all copies
    "npu_grouped_matmul": {"tuning_config ignored"},
    "npu_moe_finalize_routing": {"k ignored", "skip1 and skip2 exchanged"},  # k is read where there are no scales
    # The only value that is supported beside the default says what the default does.
    "npu_weight_quant_batchmatmul": {"inner_precise ignored"},
    "npu_dynamic_quant": {"dst_type ignored"},
    "npu_add_rms_norm_dynamic_quant": {"x1 and x2 exchanged", "output_mask ignored", "y_dtype ignored"},
    "npu_dequant_swiglu_quant": {"dst_type ignored", "round_mode ignored", "activate_dim ignored"},
}
"""Wrong uses of arguments that change no result."""


@pytest.fixture(scope="module")
def backend() -> Any:
    return torchair.get_npu_backend(compiler_config=CompilerConfig())


def fast(record: OperatorRecord) -> list[Sample]:
    names = FAST.get(record.name, (record.samples[0].name,))
    chosen = [sample for sample in record.samples if sample.name in names]
    assert len(chosen) == len(names), f"FAST[{record.name!r}] has a name that no sample of the catalogue has"
    return chosen


def samples() -> list[Any]:
    """All of the catalogue; those in ``FAST`` in the fast lane, in one dtype, the others in the slow one."""
    return [
        pytest.param(
            record,
            sample,
            dtype,
            id=f"{name}-{sample.name}-{dtype}",
            marks=[] if sample in fast(record) and dtype == record.dtypes_on("emulated")[0] else [pytest.mark.slow],
        )
        for name, record in CATALOGUE.items()
        for sample in record.samples
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
    assert LOWERED.keys() == CATALOGUE.keys() >= FAST.keys()


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_fast_samples_see_every_wrong_use_of_an_argument(name: str) -> None:
    record = CATALOGUE[name]
    possible = argument_faults.possible(record)
    unseen = possible.keys() - argument_faults.seen(record, fast(record))
    more = {fault: possible[fault] for fault in sorted(unseen - HARMLESS.get(name, set()))}
    assert not more, f"nothing in FAST[{name!r}] shows these faults; samples that have the arguments: {more}"
    assert unseen == HARMLESS.get(name, set())
    same = argument_faults.constant(record, fast(record))
    assert not same, f"these arguments have one value in all of FAST[{name!r}], and others in the catalogue"


def test_samples_that_see_too_little_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAST, "npu_rms_norm", ("regular",))
    with pytest.raises(AssertionError, match="epsilon ignored"):
        test_the_fast_samples_see_every_wrong_use_of_an_argument("npu_rms_norm")
    monkeypatch.setitem(FAST, "scatter_update", ("BNSD_decode",))
    with pytest.raises(AssertionError, match="one value in all of FAST"):
        test_the_fast_samples_see_every_wrong_use_of_an_argument("scatter_update")


WRONG = {
    "RmsNorm": (
        "npu_rms_norm", "tiny_epsilon_1e-5", lambda right: lambda x, gamma, *, epsilon: right(x, gamma)
    ),
    "PromptFlashAttention": (
        "npu_prompt_flash_attention", "ragged_mode_4",
        lambda right: lambda *inputs, pre_tokens, **attributes: right(*inputs, **attributes),
    ),
    "IncreFlashAttention": (
        "npu_incre_flash_attention", "mask_in_cache_coordinates",
        lambda right: lambda *inputs, **attributes: right(*inputs[:-1], None, **attributes),
    ),
}  # fmt: skip
"""GE operator -> the operator lowered to it, a sample in ``FAST``, what makes a wrong function of the right one."""


@pytest.mark.parametrize("type_", WRONG)
def test_a_wrong_operator_of_the_table_is_seen(type_: str, monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    name, wanted, make = WRONG[type_]
    record = CATALOGUE[name]
    (sample,) = [sample for sample in fast(record) if sample.name == wanted]
    entry = TABLE[type_]
    monkeypatch.setitem(TABLE, type_, dataclasses.replace(entry, function=make(entry.function)))
    run, _ = compiled(operator_of(name), backend)
    assert find_problems(record, sample.parameters, "float32", "npu", sample.seed, implementation=run)


@pytest.mark.parametrize("type_", ["IncreFlashAttention", "FusedInferAttentionScore"])
def test_several_keys_or_values_are_refused(type_: str) -> None:
    """One per row of the batch, on hardware."""
    x, entry = torch.ones(1, 1, 16), TABLE[type_]
    rest = [None] * (len(entry.parameters) - 3)
    entry.function(x, [x], [x], *rest, num_heads=1)
    for keys, values in (([x, x], [x]), ([x], [x, x])):
        with pytest.raises(ValueError, match="2 keys or values: one tensor of each is emulated"):
            entry.function(x, keys, values, *rest, num_heads=1)


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
