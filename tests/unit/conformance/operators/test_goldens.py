"""The goldens against each other and against identities that hold whatever the operator's details."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen2_npu.conformance.operators import CATALOGUE, OperatorRecord, Sample
from qwen2_npu.conformance.operators import incre_flash_attention as ifa
from qwen2_npu.conformance.operators import prompt_flash_attention as pfa
from qwen2_npu.conformance.operators.record import Arguments
from qwen2_npu.conformance.operators.rounding import round_to
from tests.unit.conformance.operators.test_catalogue import comparable

PFA, IFA, FIA = (
    CATALOGUE[name]
    for name in ("npu_prompt_flash_attention", "npu_incre_flash_attention", "npu_fused_infer_attention_score")
)


def first(record: OperatorRecord, arguments: Arguments) -> np.ndarray:
    value = record.golden(arguments, "float32")[0].value
    assert value is not None
    return value


def prefill(**parameters: Any) -> Arguments:
    return PFA.arguments({"B": 2, "Sq": 7, "Nq": 4, "Nkv": 2, **parameters}, "float32", 3)


def test_mode_2_is_the_full_triangular_mask() -> None:
    compressed = prefill(mask="compressed", sparse_mode=2)
    full = {**compressed, "atten_mask": np.triu(np.ones((7, 7), bool), 1), "sparse_mode": 1}
    np.testing.assert_array_equal(first(PFA, compressed), first(PFA, full))


def test_modes_2_3_and_4_agree_on_squares() -> None:
    causal, bottom_right = (prefill(mask="compressed", sparse_mode=mode) for mode in (2, 3))
    band = prefill(mask="compressed", sparse_mode=4, pre_tokens=100, next_tokens=0)
    np.testing.assert_array_equal(first(PFA, causal), first(PFA, bottom_right))
    np.testing.assert_array_equal(first(PFA, causal), first(PFA, band))


def test_mode_3_on_more_keys_is_the_tail_of_mode_2() -> None:
    """Continuation: the last queries of a causal prefill, alone, against all the keys."""
    whole = prefill(mask="compressed", sparse_mode=2)
    tail = {**whole, "query": whole["query"][:, 4:], "sparse_mode": 3}
    np.testing.assert_allclose(first(PFA, tail), first(PFA, whole)[:, 4:], rtol=1e-14)


def test_high_precision_modes_change_nothing_but_the_bound() -> None:
    low, high = prefill(mask="compressed", sparse_mode=2), prefill(mask="compressed", sparse_mode=12)
    np.testing.assert_array_equal(first(PFA, low), first(PFA, high))
    bounds = [PFA.golden(arguments, "float16")[0].bound for arguments in (low, high)]
    assert (bounds[0][:, 1:] > bounds[1][:, 1:]).all()  # type: ignore[index]


def test_decode_is_prefill_of_one_query() -> None:
    parameters: dict[str, Any] = {"B": 3, "S": 12, "Nq": 6, "Nkv": 2, "lengths": [12, 5, 0]}
    decode = IFA.arguments(parameters, "float32", 1)
    as_prefill = {name: value for name, value in decode.items() if name != "actual_seq_lengths"}
    as_prefill["actual_seq_lengths_kv"] = decode["actual_seq_lengths"]
    np.testing.assert_allclose(first(IFA, decode), first(PFA, as_prefill), rtol=1e-14)


def test_right_aligned_window_is_a_shifted_cache() -> None:
    aligned = IFA.arguments({"B": 2, "S": 16, "lengths": [5, 5], "padding": 4}, "float32", 1)
    shifted = {**aligned, "key": aligned["key"][:, 7:12], "value": aligned["value"][:, 7:12]}
    del shifted["kv_padding_size"]
    np.testing.assert_array_equal(first(IFA, aligned), first(IFA, shifted))


def test_window_limits() -> None:
    assert ifa.window(16, 5, None) == (0, 5)
    assert ifa.window(16, 5, 4) == (7, 12)
    assert ifa.window(16, 5, -4) == (11, 16)
    assert ifa.window(16, 12, 4) == (0, 12)
    assert ifa.window(16, 13, 4) == (0, 0)


def test_fully_masked_decode_row_is_the_mean_of_its_window() -> None:
    arguments = IFA.arguments({"B": 1, "S": 16, "mask": "everything", "lengths": [6], "padding": 3}, "float32")
    np.testing.assert_allclose(first(IFA, arguments)[:, 0], arguments["value"][:, 7:13].mean(axis=1), rtol=1e-13)


def test_fully_masked_prefill_rows_are_undefined_and_only_they() -> None:
    defined = PFA.golden(prefill(mask="blind", next_tokens=pfa.UNLIMITED), "float32")[0].defined
    assert defined is not None
    np.testing.assert_array_equal(defined.all(axis=(0, 2, 3)), np.arange(7) % 2 == 1)
    assert not defined[:, ::2].any()


def test_a_mask_that_contradicts_its_band_is_undefined() -> None:
    defined = PFA.golden(prefill(mask="keep_all", next_tokens=0), "float32")[0].defined
    assert defined is not None
    np.testing.assert_array_equal(defined[0, :, 0, 0], [*[False] * 6, True])


def test_default_call_attends_to_everything() -> None:
    arguments = prefill()
    permuted = {**arguments, "key": arguments["key"][:, ::-1], "value": arguments["value"][:, ::-1]}
    np.testing.assert_allclose(first(PFA, arguments), first(PFA, permuted), rtol=1e-12)


@pytest.mark.parametrize("layout", ["BSH", "BNSD", "BNSD_BSND"])
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    sample = {"mask": "random", "next_tokens": pfa.UNLIMITED}
    bsnd, other = first(PFA, prefill(**sample)), first(PFA, prefill(layout=layout, **sample))
    back = other.swapaxes(1, 2) if layout == "BNSD" else other
    np.testing.assert_array_equal(back.reshape(bsnd.shape), bsnd)


def test_grouped_heads_read_their_own_group() -> None:
    grouped = prefill()
    repeated = {name: np.repeat(grouped[name], 2, axis=2) for name in ("key", "value")}
    np.testing.assert_array_equal(first(PFA, grouped), first(PFA, {**grouped, **repeated, "num_key_value_heads": 4}))


def test_successor_takes_the_decode_path_for_one_query() -> None:
    parameters: dict[str, Any] = {"B": 2, "S": 12, "mask": "everything", "lengths": [12, 5]}
    np.testing.assert_array_equal(
        first(FIA, FIA.arguments(parameters, "float32")), first(IFA, IFA.arguments(parameters, "float32"))
    )


def test_log_sum_exp_normalises_the_weights() -> None:
    """With V all ones and one key per row, lse is the score itself."""
    arguments = FIA.arguments({"B": 1, "Sq": 3, "Skv": 1, "Nq": 1, "Nkv": 1, "softmax_lse_flag": True}, "float32")
    lse = FIA.golden(arguments, "float32")[1].value
    assert lse is not None
    score = np.einsum("bsnd,btnd->bnst", arguments["query"], arguments["key"]) * arguments["scale"]
    np.testing.assert_allclose(lse, score, rtol=1e-13)


def test_add_rms_norm_rounds_before_and_after_gamma() -> None:
    """In bfloat16 it differs from rms_norm of the rounded sum in some element, and only by roundings."""
    record, plain = CATALOGUE["npu_add_rms_norm"], CATALOGUE["npu_rms_norm"]
    arguments = record.arguments({"shape": [2, 7, 896]}, "bfloat16")
    y, _, x = (expected.value for expected in record.golden(arguments, "bfloat16"))
    assert y is not None
    assert x is not None
    np.testing.assert_array_equal(x, round_to(arguments["x1"] + arguments["x2"], "bfloat16"))
    once = plain.golden({"input": x, "gamma": arguments["gamma"]}, "bfloat16")[0].value
    assert once is not None
    assert (once != y).any()
    np.testing.assert_allclose(once, y, rtol=3 * 2.0**-8)


def test_rotation_keeps_lengths_and_composes() -> None:
    record = CATALOGUE["npu_rotary_mul"]
    arguments = record.arguments({"shape": [2, 7, 3, 64], "table": [2, 7, 1, 64]}, "float32")
    turned = first(record, arguments)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(arguments["input"], axis=-1), rtol=1e-6)
    back = first(record, {**arguments, "input": turned, "r2": -arguments["r2"]})
    np.testing.assert_allclose(back, arguments["input"], atol=1e-6)


def test_swiglu_halves() -> None:
    record = CATALOGUE["npu_swiglu"]
    made = first(record, {"input": np.array([[0.0, 100.0, 2.0, 3.0]])})
    np.testing.assert_allclose(made, [[0.0, 300.0]])


def test_scatter_writes_a_slice_per_row() -> None:
    record = CATALOGUE["scatter_update"]
    arguments = {
        "input": np.zeros((3, 4)),
        "indices": np.array([2, 0]),
        "updates": np.ones((2, 2)),
        "axis": 1,
    }
    np.testing.assert_array_equal(first(record, arguments), [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_the_experts_share_a_softmax() -> None:
    """All experts chosen: the values are a whole softmax, in descending order, and every expert is there once."""
    record = CATALOGUE["npu_moe_gating_top_k_softmax"]
    values, experts, numbers = record.golden(record.arguments({"shape": [5, 9], "k": 9}, "float32"), "float32")
    assert values.value is not None
    assert experts.value is not None
    assert numbers.value is not None
    np.testing.assert_allclose(values.value.sum(-1), 1, rtol=1e-6)
    assert (np.diff(values.value) <= 0).all()
    assert (np.sort(experts.value) == np.arange(9)).all()
    np.testing.assert_array_equal(numbers.value, np.arange(45).reshape(9, 5).T)


def test_experts_that_float32_cannot_tell_apart_are_not_compared() -> None:
    record = CATALOGUE["npu_moe_gating_top_k_softmax"]
    near, equal = np.array([[1.0, 1.0 + 1e-9, 0.0]]), np.array([[1.0, 1.0, 0.0]])
    for x, defined in ((near, [False, False, True]), (equal, [True, True, True])):
        experts = record.golden({"x": x, "k": 3}, "float32")[1]
        assert experts.defined is not None
        assert experts.defined[0].tolist() == defined


def test_routing_and_its_reverse_give_every_row_back() -> None:
    """Copies, put back with weights that sum to one, are the rows; the two kinds of index are inverse."""
    route, back = CATALOGUE["npu_moe_init_routing_v2"], CATALOGUE["npu_moe_finalize_routing"]
    arguments = route.arguments({"rows": 7, "width": 5, "k": 3, "experts": 6}, "float32")
    copies, index, sizes, _ = (expected.value for expected in route.golden(arguments, "float32"))
    scattered = route.golden({**arguments, "row_idx_type": 1}, "float32")[1].value
    ends = route.golden({**arguments, "expert_tokens_num_type": 0}, "float32")[2].value
    assert index is not None
    assert scattered is not None
    assert sizes is not None
    np.testing.assert_array_equal(scattered[index.astype(int)], np.arange(21))
    np.testing.assert_array_equal(np.cumsum(sizes), ends)
    given = {
        "expanded_permuted_rows": copies,
        "scales": np.full((7, 3), 1 / 3),
        "expanded_src_to_dst_row": index.astype(np.int32),
        "drop_pad_mode": 2,
    }
    given |= dict.fromkeys(("skip1", "skip2", "bias", "export_for_source_row"))
    np.testing.assert_allclose(first(back, given), arguments["x"], rtol=1e-6)


def test_groups_as_ends_as_sizes_and_as_lists_are_one() -> None:
    record, made = CATALOGUE["npu_grouped_matmul"], []
    for form in ({}, {"ends": True}, {"listed": "weights"}, {"listed": "both"}):
        made.append(first(record, record.arguments({"sizes": [3, 2], "inner": 8, "columns": 4, **form}, "float32")))
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def every_sample() -> Iterator[Any]:
    for record in CATALOGUE.values():
        for sample in record.samples:
            yield pytest.param(record, sample, id=f"{record.name}-{sample.name}")


@pytest.mark.parametrize(("record", "sample"), list(every_sample()))
def test_golden_is_well_formed(record: OperatorRecord, sample: Sample) -> None:
    """Bounds are finite and not negative, values hold where defined; the golden leaves its arguments alone."""
    for dtype in record.dtypes:
        arguments = record.arguments(sample.parameters, dtype, sample.seed)
        copies = copy.deepcopy(arguments)
        for expected in record.golden(arguments, dtype):
            if expected.value is None:
                continue
            defined = True if expected.defined is None else expected.defined
            assert expected.bound is not None
            assert expected.bound.shape == expected.value.shape
            assert np.all(np.isfinite(np.where(defined, expected.value, 0.0)))
            assert np.all(np.where(defined, expected.bound >= 0, True))
            assert np.all(np.isfinite(np.where(defined, expected.bound, 0.0)))
        for name, before in copies.items():
            assert comparable(arguments[name]) == comparable(before), name


# Sample -> elements that the documentation leaves open: rows that lose all positions, near ties, copies of no expert.
NOT_DEFINED: dict[str, dict[str, int]] = {
    PFA.name: {"fully_masked_rows": 768, "mode_3_tall": 896},
    FIA.name: {"prefill_fully_masked_rows": 768, "prefill_mode_3_tall": 896, "prefill_lse_ragged": 10},
    "npu_moe_gating_top_k_softmax": {"large": 2, "tiny": 3},
    "npu_moe_init_routing_v2": {
        "active": 144, "active_ends": 112, "active_scatter": 99, "none_for_the_active": 64, "finished_rows": 72,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_all_is_compared_but_what_the_documentation_leaves_open(name: str) -> None:
    found: dict[str, int] = {}
    for sample in CATALOGUE[name].samples:
        arguments = CATALOGUE[name].arguments(sample.parameters, "bfloat16", sample.seed)
        for each in CATALOGUE[name].golden(arguments, "bfloat16"):
            if each.defined is not None and each.value is not None:
                left_open = int((~np.broadcast_to(each.defined, each.value.shape)).sum())
                found[sample.name] = found.get(sample.name, 0) + left_open
    assert {sample: count for sample, count in found.items() if count} == NOT_DEFINED.get(name, {})


@pytest.mark.parametrize("record", [PFA, IFA, FIA], ids=lambda record: record.name)
def test_attention_rows_of_the_batch_are_independent(record: OperatorRecord) -> None:
    """Swapping two rows of every argument swaps two rows of the output."""
    parameters: dict[str, Any] = {"B": 2, "mask": "random"}
    parameters |= {"S": 9, "lengths": [9, 4]} if record is IFA else {"Sq": 6, "mask_shape": "BSS", "sparse_mode": 1}
    arguments = record.arguments(parameters, "float32")
    swapped = {
        name: value[::-1] if isinstance(value, (np.ndarray, list)) else value for name, value in arguments.items()
    }
    np.testing.assert_array_equal(first(record, swapped), first(record, arguments)[::-1])
