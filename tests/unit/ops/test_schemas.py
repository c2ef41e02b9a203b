"""The schemas are torch_npu's, and the table of unsupported arguments fits them and the kernels."""

from __future__ import annotations

import inspect

import pytest
import torch

from qwen2_npu.ops import SCHEMAS, kernels
from qwen2_npu.ops.schemas import UNSUPPORTED
from tests.unit.ops.support import SNAPSHOT

EXPECTED = {
    line.removeprefix("npu::").split("(")[0]: line for line in SNAPSHOT.read_text().splitlines() if line[0] != "#"
}


def test_every_operator_has_schema_kernel_and_snapshot() -> None:
    assert set(SCHEMAS) == set(kernels) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_registered_schema_is_the_snapshot(name: str) -> None:
    assert str(getattr(torch.ops.npu, name).default._schema) == EXPECTED[name]
    assert f"npu::{SCHEMAS[name]}" == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_each_argument_is_a_kernel_parameter_or_listed_as_unsupported(name: str) -> None:
    schema = getattr(torch.ops.npu, name).default._schema
    parameters = inspect.signature(kernels[name]).parameters
    unsupported = UNSUPPORTED.get(name, {})
    for argument in schema.arguments:
        if argument.name in unsupported:
            assert unsupported[argument.name] == argument.default_value
            # A keyword arrives in **unsupported; only a positional argument needs a place.
            assert (argument.name in parameters) is not argument.kwarg_only
        else:
            assert argument.name in parameters
            if argument.has_default_value():
                assert parameters[argument.name].default == argument.default_value
