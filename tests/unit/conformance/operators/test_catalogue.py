"""The catalogue is complete: every operator has a record, every argument of every operator is exercised or refused."""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np
import pytest

from qwen2_npu.conformance.operators import CATALOGUE, DTYPES, OperatorRecord
from qwen2_npu.conformance.operators.attention import LAYOUTS
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.ops.schemas import SCHEMAS

RECORDS = [pytest.param(record, id=name) for name, record in CATALOGUE.items()]

# Arguments that no sample and no invalid input sets, with the reason.
UNTOUCHED = {
    "npu_incre_flash_attention": {
        "block_size": "read with a block_table only, which is refused",
        "inner_precise": "decode computes in float32 whatever it says",
    },
    "npu_fused_infer_attention_score": {"block_size": "read with a block_table only, which is refused"},
}


def argument_names(schema: str) -> set[str]:
    """The parameter names of a schema such as ``f(Tensor x, *, int[]? n=None) -> Tensor``."""
    inside = schema[schema.index("(") + 1 : schema.rindex(") -> ")]
    return {part.split("=")[0].split()[-1] for part in re.split(r",\s*(?![^\[]*\])", inside) if part.strip() != "*"}


def test_every_implemented_operator_has_a_record() -> None:
    assert set(CATALOGUE) == set(SCHEMAS)


@pytest.mark.parametrize("record", RECORDS)
def test_every_argument_is_exercised(record: OperatorRecord) -> None:
    touched = {name for sample in record.samples for name in record.arguments(sample.parameters, "float32")}
    touched |= {name for invalid in record.invalid for name in invalid.change}
    untouched = set(UNTOUCHED.get(record.name, {}))
    assert argument_names(SCHEMAS[record.name]) - touched == untouched


@pytest.mark.parametrize("record", RECORDS)
def test_names_are_unique(record: OperatorRecord) -> None:
    for names in ([sample.name for sample in record.samples], [invalid.name for invalid in record.invalid]):
        assert len(names) == len(set(names))


def comparable(value: object) -> object:
    """Something to compare: arrays by dtype, shape and bytes, also in lists."""
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("record", RECORDS)
def test_samples_can_be_printed_and_repeated(record: OperatorRecord) -> None:
    """A failure message is a script: parameters are literals, and the same seed builds the same arguments."""
    for sample in record.samples:
        assert ast.literal_eval(repr(dict(sample.parameters))) == dict(sample.parameters)
        once, again = (record.arguments(sample.parameters, "float32", sample.seed) for _ in range(2))
        for name, value in once.items():
            assert comparable(value) == comparable(again[name]), name


@pytest.mark.parametrize("record", RECORDS)
def test_invalid_inputs_name_their_argument(record: OperatorRecord) -> None:
    """Every pattern matches the name of an argument, so no message can pass without naming one."""
    names = argument_names(SCHEMAS[record.name])
    for invalid in record.invalid:
        assert any(re.fullmatch(invalid.match, name) for name in names), invalid.name


@pytest.mark.parametrize("record", RECORDS)
def test_every_record_covers_every_dtype_and_says_why_it_skips(record: OperatorRecord) -> None:
    assert record.dtypes == DTYPES
    assert record.samples
    assert record.invalid
    assert all(skip.reason for skip in record.skips)
    assert all(not skip.sample or skip.sample in {s.name for s in record.samples} for skip in record.skips)


def test_a_device_with_a_number_is_skipped_as_its_kind() -> None:
    """Some of CANN's operators take no float32; every other operator runs in every dtype everywhere."""
    halves = {
        *("npu_mm_all_reduce_base", "npu_weight_quant_batchmatmul", "npu_dynamic_quant"),
        "npu_add_rms_norm_dynamic_quant",
    }
    for device in ("npu", "npu:1", "emulated", "cpu", "cuda:0"):
        for name, record in CATALOGUE.items():
            narrow = name in halves and device.startswith(("npu", "emulated"))
            assert record.dtypes_on(device) == (DTYPES[1:] if narrow else DTYPES), (name, device)


# ---- attention: what one list of samples has to hold ----------------------------------------------------------------
def of_attention(name: str, phase: str) -> list[dict[str, Any]]:
    """Parameters of the samples of a phase; those of decode have a cache of S slots."""
    every = [dict(sample.parameters) for sample in CATALOGUE[name].samples]
    return [given for given in every if ("S" in given) is (phase == "decode")]


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("npu_prompt_flash_attention", "prefill"),
        ("npu_incre_flash_attention", "decode"),
        ("npu_fused_infer_attention_score", "prefill"),
        ("npu_fused_infer_attention_score", "decode"),
    ],
)
def test_attention_is_sampled_in_every_layout_mask_and_head_count_of_a_size(name: str, phase: str) -> None:
    samples = of_attention(name, phase)
    prefill = phase == "prefill"
    layouts = {given["layout"] for given in samples if "layout" in given}
    assert layouts == {None, *LAYOUTS} - {"BSND"} - ({"BNSD_BSND"} if not prefill else set())  # BSND is what is built
    masked = [given for given in samples if given.get("mask") not in (None, "compressed")]
    shapes = ("SS", "1SS", "BSS", "11SS", "B1SS") if prefill else ("BS", "B1S", "B11S")
    assert {given.get("mask_shape", shapes[0]) for given in masked} == set(shapes)
    assert {given.get("mask_dtype", "bool") for given in masked} == {"bool", "int8", "uint8"}
    heads = {(given.get("Nq", 2) // given.get("Nkv", 2), given.get("D", 64)) for given in samples}
    assert heads >= {(size.heads // size.kv_heads, size.head_dim) for size in SIZES.values()}
    ragged = [given for given in samples if len(set(given.get("kv_lengths" if prefill else "lengths", ()))) > 1]
    if prefill:
        # Mode 0 without a mask; in mode 2 the corner is not that of the lengths.
        apart = [given for given in ragged if given.get("q_lengths", given["kv_lengths"]) != given["kv_lengths"]]
        assert {given.get("sparse_mode", 0) for given in ragged} == {0, 1, 2, 3, 4}
        assert {given.get("sparse_mode", 0) for given in apart} == {0, 1, 3, 4}
    else:
        assert {("padding" in given, "mask" in given) for given in ragged} >= {(a, b) for a in (0, 1) for b in (0, 1)}
    assert any(given.get("stale", 1.0) > 1 for given in ragged)
