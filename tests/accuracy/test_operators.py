"""Every operator of the catalogue on the device under test, against its float64 golden.

What is compared, with which tolerance and why, is said in ``qwen2_npu/conformance/operators/<operator>.py``;
here the records are only run: samples, generated samples, invalid inputs, non-contiguous inputs, shapes on
the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_npu.conformance.operators import CATALOGUE, Invalid, OperatorRecord, Sample, check
from qwen2_npu.conformance.operators.check import by_name, call, find_problems, operator_of, to_tensors

SAMPLES = [
    pytest.param(record, sample, dtype, id=f"{record.name}-{sample.name}-{dtype}")
    for record in CATALOGUE.values()
    for sample in record.samples
    for dtype in record.dtypes
]
INVALID = [
    pytest.param(record, invalid, id=f"{record.name}-{invalid.name}")
    for record in CATALOGUE.values()
    for invalid in record.invalid
]
RECORDS = [pytest.param(record, id=name) for name, record in CATALOGUE.items()]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """What --device says, where the root conftest.py defines it; else the CPU."""
    return str(request.config.getoption("--device", default=None) or "cpu")


def torch_device(device: str) -> str:
    """The emulated device is an NPU to torch."""
    return "npu" if device == "emulated" else device


def graph_backend(device: str) -> Any:
    """What lowers graphs for the device: torchair for NPUs."""
    if not device.startswith("npu"):
        return "aot_eager"
    import torchair

    return torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())


@pytest.mark.parametrize(("record", "sample", "dtype"), SAMPLES)
def test_matches_golden(record: OperatorRecord, sample: Sample, dtype: str, device: str) -> None:
    if skip := record.skip(sample.name, dtype, device):
        pytest.skip(f"{skip.what}: {skip.reason}")
    check(record.name, sample.parameters, dtype, torch_device(device), sample.seed)


@pytest.mark.parametrize("record", RECORDS)
def test_matches_golden_on_generated_samples(record: OperatorRecord, device: str) -> None:
    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(record.strategy(), st.sampled_from(record.dtypes_on(device)), st.integers(0, 1 << 16))
    def run(parameters: dict[str, Any], dtype: str, seed: int) -> None:
        check(record.name, parameters, dtype, torch_device(device), seed)

    run()


@pytest.mark.parametrize(("record", "invalid"), INVALID)
def test_refuses(record: OperatorRecord, invalid: Invalid, device: str) -> None:
    """The right exception, whose message names the operator and the argument, with nothing written."""
    if invalid.only_on and device not in invalid.only_on:
        pytest.skip(f"checked on {', '.join(invalid.only_on)} only")
    dtype = record.dtypes_on(device)[0]
    arguments = record.arguments(invalid.parameters, dtype)
    for name, change in invalid.change.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    tensors = to_tensors(arguments, dtype, torch_device(device))
    before = {name: value.clone() for name, value in by_name(tensors).items()}
    with pytest.raises(invalid.error) as raised:
        call(operator_of(record.name), tensors)
    message = str(raised.value)
    assert re.search(invalid.match, message), f"{invalid.match!r} is not in the message: {message}"
    assert record.name in message, f"the message does not name the operator: {message}"
    for name, value in before.items():
        assert torch.equal(by_name(tensors)[name], value), f"{name} was written before the error"


@pytest.mark.parametrize("record", RECORDS)
def test_accepts_or_refuses_strided_tensors(record: OperatorRecord, device: str) -> None:
    """Non-contiguous arguments give the same result, or an error that says so: never a wrong result."""
    sample = record.samples[0]
    try:
        check(
            record.name, sample.parameters, record.dtypes_on(device)[0], torch_device(device), sample.seed, strided=True
        )
    except ValueError as refused:
        if "contiguous" not in str(refused):
            raise


@pytest.mark.parametrize("record", RECORDS)
def test_matches_golden_when_compiled(record: OperatorRecord, device: str) -> None:
    """Traced, functionalised and run: same values, and the side effects that a graph has."""
    torch._dynamo.reset()  # all records share one lambda, whose recompilations are limited
    sample = record.samples[0]

    def run(**tensors: Any) -> Any:
        return operator_of(record.name)(**tensors)

    compiled = torch.compile(run, backend=graph_backend(torch_device(device)), fullgraph=True, dynamic=False)
    problems = find_problems(
        replace(record, writes=record.graph_writes),
        sample.parameters,
        "bfloat16",
        torch_device(device),
        sample.seed,
        implementation=compiled,
    )
    assert not problems


@pytest.mark.parametrize("record", RECORDS)
def test_meta_kernel_has_the_same_shapes_and_dtypes(record: OperatorRecord) -> None:
    for sample in record.samples:
        if record.skip(sample.name, "bfloat16", "meta"):
            continue
        arguments = record.arguments(sample.parameters, "bfloat16", sample.seed)
        expected = record.golden(arguments, "bfloat16")
        outputs = call(operator_of(record.name), to_tensors(arguments, "bfloat16", "meta"), record.writes)
        assert len(outputs) == len(expected), sample.name
        for want, output in zip(expected, outputs, strict=True):
            assert output.device.type == "meta", sample.name
            assert output.dtype == getattr(torch, want.dtype or "bfloat16"), (sample.name, want.name)
            if want.value is not None:
                assert tuple(output.shape) == want.value.shape, (sample.name, want.name)


@pytest.mark.parametrize("record", RECORDS)
def test_schema_is_registered(record: OperatorRecord) -> None:
    """The operator exists under its name and takes every argument that the record builds."""
    operator_of(record.name)
    schema: Callable[..., Any] = getattr(torch.ops.npu, record.name).default._schema
    taken = {argument.name for argument in schema.arguments}  # type: ignore[attr-defined]
    for sample in record.samples:
        assert set(record.arguments(sample.parameters, "float32", sample.seed)) <= taken, sample.name
