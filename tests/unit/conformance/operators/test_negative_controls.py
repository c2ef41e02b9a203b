"""The catalogue notices the faults it exists for.

Without a fault the plain implementations pass every sample, so the derived tolerances can be met; with one, some sample
fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.operators import CATALOGUE, DTYPES, Expected, OperatorRecord, Sample, check
from qwen2_npu.conformance.operators.check import compare, find_problems, run_and_compare
from qwen2_npu.conformance.operators.record import Arguments
from qwen2_npu.conformance.operators.rounding import FORMATS, FloatArray
from tests.unit.conformance.operators.plain import PLAIN, prompt_flash_attention, swiglu

NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Fault:
    """One way of going wrong, and the dtypes in which it shows."""

    name: str
    dtypes: tuple[str, ...] = DTYPES


def faults(*names: str, narrow: tuple[str, ...] = (), bfloat16: tuple[str, ...] = ()) -> tuple[Fault, ...]:
    return (
        *(Fault(name) for name in names),
        *(Fault(name, NARROW) for name in narrow),
        *(Fault(name, ("bfloat16",)) for name in bfloat16),
    )


_PREFILL = (
    "heads_modulo",
    "mask_inverted",
    "first_mask_for_every_row",
    "scale_missing",
    "scores_not_shifted",
    "causal_off_by_one",
    "causal_without_a_mask",
    "corner_at_top_left",
    "corner_ignores_lengths",
    "band_one_too_narrow",
    "kv_lengths_ignored",
    "kv_length_off_by_one",
    "first_length_for_every_row",
    "tail_rows_kept",
    "output_layout_ignored",
)
_DECODE = (
    "heads_modulo",
    "mask_inverted",
    "scale_missing",
    "scores_not_shifted",
    "window_off_by_one",
    "window_one_short",
    "padding_ignored",
    "negative_padding_counts",
    "clamps_the_start",
    "mask_in_window_coordinates",
    "masked_rows_are_zero",
    "masked_rows_average_the_cache",
)
_ROTATION = (
    "halves_swapped",
    "interleaved",
    "cos_and_sin_swapped",
    "position_off_by_one",
    "first_half_of_the_table_used_twice",
)
_SCATTER = ("one_slot_off", "one_slot_short", "first_index_for_every_row", "clears_the_rest")
_PAGED = (
    "one_slot_off",
    "slots_of_the_first_block",
    "last_token_forgotten",
    "first_token_for_every_slot",
    "value_forgotten",
    "clears_the_rest",
)
_ROWS = ("first_scale_for_every_row", "signed_maximum", "divided_by_128", "truncated")
_NORM = ("epsilon_changed", "epsilon_outside_the_root", "divided_by_width_minus_one")

FAULTS: dict[str, tuple[Fault, ...]] = {
    "npu_prompt_flash_attention": faults(*_PREFILL, bfloat16=("scores_in_the_dtype",)),
    "npu_incre_flash_attention": faults(*_DECODE, narrow=("scores_in_the_dtype",)),
    "npu_fused_infer_attention_score": faults(
        "decode_takes_the_prefill_path",
        "lse_in_base_two",
        narrow=("scores_in_the_dtype",),
        bfloat16=tuple(dict.fromkeys((*_PREFILL, *_DECODE))),  # in every dtype above, for its predecessors
    ),
    "npu_rms_norm": faults(*_NORM, "gamma_ignored", narrow=("rounded_before_gamma", "rstd_in_the_dtype")),
    "npu_add_rms_norm": faults(
        *_NORM,
        "residual_not_added",
        narrow=("rstd_from_unrounded_x", "y_from_unrounded_x", "not_rounded_before_gamma"),
    ),
    "npu_apply_rotary_pos_emb": faults(*_ROTATION, "out_of_place", "key_forgotten"),
    "npu_rotary_mul": faults(*_ROTATION, "in_place"),
    "scatter_update": faults(*_SCATTER, "in_place"),
    "scatter_update_": faults(*_SCATTER, "out_of_place"),
    "npu_scatter_pa_kv_cache_functional": faults(*_PAGED, "in_place"),
    "npu_scatter_pa_kv_cache": faults(*_PAGED, "out_of_place"),
    "npu_swiglu": faults(
        "halves_swapped", "dim_ignored", "gelu", "exponential_overflows", narrow=("rounded_after_silu",)
    ),
    "npu_mm_all_reduce_base": faults(
        "bias_forgotten",
        "x3_forgotten",
        "x3_twice",
        narrow=("product_rounded_before_bias", "not_rounded_before_x3"),
    ),
    "npu_moe_gating_top_k_softmax": faults(
        "ties_to_the_last",
        "smallest_first",
        "normalised_again",
        "scores_not_shifted",
        "finished_ignored",
        "finished_get_the_last_expert",
        "row_numbers_by_row",
        narrow=("softmax_in_the_dtype",),
    ),
    "npu_moe_init_routing_v2": faults(
        "later_rows_first",
        "by_column",
        "rows_by_column",
        "range_ignored",
        "inactive_at_zero",
        "ends_for_sizes",
        "expert_zero_is_empty",
        "gather_for_scatter",
    ),
    "npu_grouped_matmul": faults(
        "empty_groups_skipped",
        "one_row_to_the_next_group",
        "first_weight_for_all",
        "reversed",
        "bias_forgotten",
        narrow=("product_rounded_before_bias",),
    ),
    "npu_moe_finalize_routing": faults(
        "other_order",
        "scales_ignored",
        "bias_forgotten",
        "bias_not_scaled",
        "last_copy_dropped",
        "skip1_forgotten",
        "skip2_forgotten",
        bfloat16=("scales_rounded", "terms_rounded", "sum_rounded_before_skips"),
    ),
    "npu_weight_quant_batchmatmul": faults(
        "scale_of_the_neighbour",
        "scale_of_the_first_column",
        "scale_by_row",
        "zero_point_of_one",
        "weight_unsigned",
        "bias_forgotten",
    ),
    "npu_quant_matmul": faults(
        "scale_of_the_neighbour",
        "token_scale_ignored",
        "first_token_scale_for_every_row",
        "bias_forgotten",
        "bias_on_the_other_side",
        "sums_in_16_bits",
        "sums_in_float32",
    ),
    "npu_dynamic_quant": faults(*_ROWS, "smooth_scales_ignored"),
    "npu_add_rms_norm_dynamic_quant": faults(
        *_ROWS, "residual_not_added", "epsilon_ignored", "gamma_ignored", narrow=("norm_rounded",)
    ),
    "npu_dequant_swiglu_quant": faults(
        *_ROWS,
        "scale_of_the_neighbour",
        "exponential_overflows",
        "activation_scale_ignored",
        "first_activation_scale_for_every_row",
        "halves_swapped",
    ),
}


@cache
def prepared(name: str, sample: str, dtype: str) -> tuple[Arguments, tuple[Expected, ...]]:
    """Arguments and golden of a sample; every fault runs against the same ones."""
    record = CATALOGUE[name]
    found = next(one for one in record.samples if one.name == sample)
    arguments = record.arguments(found.parameters, dtype, found.seed)
    return arguments, record.golden(arguments, dtype)


def problems_of(record: OperatorRecord, sample: Sample, dtype: str, fault: str = "") -> list[str]:
    def implementation(**tensors: Any) -> Any:
        return PLAIN[record.name](fault, **tensors)

    return run_and_compare(record, *prepared(record.name, sample.name, dtype), dtype, implementation=implementation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(CATALOGUE))
def test_a_correct_implementation_passes(name: str, dtype: str) -> None:
    record = CATALOGUE[name]
    failed = {sample.name: found for sample in record.samples if (found := problems_of(record, sample, dtype))}
    assert not failed


@pytest.mark.parametrize(
    ("name", "fault", "dtype"),
    [
        pytest.param(name, fault.name, dtype, id=f"{name}-{fault.name}-{dtype}")
        for name, list_of_faults in FAULTS.items()
        for fault in list_of_faults
        for dtype in fault.dtypes
    ],
)
def test_a_fault_is_caught(name: str, fault: str, dtype: str) -> None:
    record = CATALOGUE[name]
    assert any(problems_of(record, sample, dtype, fault) for sample in record.samples), "no sample notices"


# Last bits that a result may lose before most samples notice, in float32, bfloat16 and float16; elsewhere 1, the first.
BITS: dict[str, tuple[int, int, int]] = {
    "npu_prompt_flash_attention": (10, 2, 4),  # float16 scores
    "npu_incre_flash_attention": (10, 2, 2),
    "npu_fused_infer_attention_score": (10, 2, 2),
    "npu_rms_norm": (7, 1, 1),
    "npu_add_rms_norm": (7, 1, 1),
    "npu_apply_rotary_pos_emb": (2, 2, 2),
    "npu_rotary_mul": (2, 2, 2),
    "npu_swiglu": (4, 1, 1),
    "npu_mm_all_reduce_base": (9, 1, 1),
    "npu_moe_gating_top_k_softmax": (7, 1, 1),
    "npu_grouped_matmul": (8, 1, 1),
    "npu_moe_finalize_routing": (4, 1, 5),  # float16 itself
    "npu_weight_quant_batchmatmul": (9, 3, 3),
}
# Of results that are float32 in every dtype.
FLOAT32_BITS = {
    "npu_fused_infer_attention_score softmax_lse": 9,
    "npu_rms_norm rstd": 8,
    "npu_add_rms_norm rstd": 9,
    "npu_dynamic_quant scale": 3,
    "npu_add_rms_norm_dynamic_quant scale": 12,
    "npu_dequant_swiglu_quant scale": 7,
}
EXACT = ("npu_add_rms_norm x",)


def without_last_bits(value: FloatArray, dtype: str, bits: int) -> FloatArray:
    kept = FORMATS[dtype].precision - bits
    fraction, exponent = np.frexp(value)
    return np.ldexp(np.rint(np.ldexp(fraction, kept)), exponent - kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(CATALOGUE))
def test_a_result_without_its_last_bits_is_caught(name: str, dtype: str) -> None:
    """By three samples of four, so no tolerance is that of a coarser dtype. Zeros have none to lose."""
    noticed: dict[str, list[bool]] = {}
    for sample in CATALOGUE[name].samples:
        for expected in prepared(name, sample.name, dtype)[1]:
            output, form = f"{name} {expected.name}", expected.dtype or dtype
            if form in FORMATS and expected.value is not None and expected.value.any():
                bits = FLOAT32_BITS.get(output) or BITS.get(name, (1, 1, 1))[DTYPES.index(dtype)]
                coarser = without_last_bits(expected.value, form, 1 if output in EXACT else bits)
                noticed.setdefault(output, []).append(compare(expected, coarser) is not None)
    assert noticed
    for output, found in noticed.items():
        assert sum(found) >= 0.75 * len(found), output


def test_every_operator_has_faults_and_a_plain_implementation() -> None:
    assert set(FAULTS) == set(PLAIN) == set(CATALOGUE)
    assert all(FAULTS.values())


def test_failure_says_what_and_how_to_reproduce() -> None:
    """The message names operator, dtype, worst element with bound, and its last lines run."""
    sample = CATALOGUE["npu_swiglu"].samples[0]
    with pytest.raises(AssertionError) as raised:
        check(
            "npu_swiglu",
            sample.parameters,
            "bfloat16",
            seed=7,
            implementation=lambda **t: swiglu("halves_swapped", **t),
        )
    message = str(raised.value)
    for part in (
        "npu_swiglu (bfloat16 on cpu)",
        "output 'out'",
        "worst at (",
        "got ",
        "want ",
        "bound ",
        "seed=7",
    ):
        assert part in message
    script = message.split("reproduce with:\n")[1].replace("\n  ", "\n").strip()
    compile(script, "snippet", "exec")
    assert repr(dict(sample.parameters)) in script


def test_nan_where_nothing_is_defined_is_caught() -> None:
    """Fully masked rows are not compared, but NaN or infinity in them is a failure."""
    record = CATALOGUE["npu_prompt_flash_attention"]
    parameters = {"B": 2, "Sq": 6, "mask": "blind", "next_tokens": 2147483647}

    def with_nan(**tensors: Any) -> Any:
        out = prompt_flash_attention("", **tensors)
        out[:, 0] = torch.nan
        return out

    assert not find_problems(record, parameters, "float32", implementation=lambda **t: prompt_flash_attention("", **t))
    (problem,) = find_problems(record, parameters, "float32", implementation=with_nan)
    assert "not defined by the documentation" in problem


@pytest.mark.parametrize(
    ("break_output", "complaint"),
    [
        (lambda out: out.double(), "dtype torch.float64"),
        (lambda out: out[:1], "shape (1, 5, 256), expected (2, 5, 256)"),
        (lambda out: (out, out), "2 outputs, expected 1"),
    ],
)
def test_wrong_kind_of_output_is_caught(break_output: Callable[[torch.Tensor], Any], complaint: str) -> None:
    record = CATALOGUE["npu_swiglu"]
    found = find_problems(
        record,
        record.samples[0].parameters,
        "float32",
        implementation=lambda **t: break_output(swiglu("", **t)),
    )
    assert any(complaint in problem for problem in found), found
