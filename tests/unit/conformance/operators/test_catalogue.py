"""The catalogue is complete: every operator has a record, every argument of every operator is exercised or refused."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest

from qwen2_npu.conformance.operators import CATALOGUE, DTYPES, OperatorRecord
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
