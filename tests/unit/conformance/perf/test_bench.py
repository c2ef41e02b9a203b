"""The documented number beside a measured one, and the order of the work."""

from __future__ import annotations

from qwen2_npu.conformance.perf import bench
from qwen2_npu.conformance.perf.bench import Case


def test_a_steps_batches_come_together_so_that_its_model_is_built_once():
    assert bench.cases(["original", "swiglu"], [1, 4]) == [
        Case("original", 1), Case("original", 4), Case("swiglu", 1), Case("swiglu", 4)
    ]  # fmt: skip


def test_the_guides_number_is_that_of_the_same_row():
    assert bench.documented_ms("7B", Case("fused_qkv", 4), "eager", "prefill") == 366
    assert bench.documented_ms("7B", Case("fused_qkv", 4), "torchair", "decode") == 24
    assert bench.documented_ms("7B", Case("fused_qkv", 48), "torchair", "prefill") == 3692


def test_where_the_guide_has_no_row_there_is_no_number():
    assert bench.documented_ms("7B", Case("swiglu", 4), "eager", "prefill") is None
    assert bench.documented_ms("7B", Case("fused_qkv", 48), "eager", "prefill") is None
    assert bench.documented_ms("72B", Case("fused_qkv", 4), "eager", "prefill") is None  # eight cards there
