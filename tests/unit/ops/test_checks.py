"""What every operator checks of its arguments, and how errors name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu.ops import checks
from qwen2_npu.ops.schemas import UNSUPPORTED

ACCELERATOR = next((k for k in ("npu", "cuda") if hasattr(torch, k) and getattr(torch, k).is_available()), None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "a torch.float32 tensor of shape (2, 3)"),
        ([torch.zeros(1).half(), 3], "[a torch.float16 tensor of shape (1,), 3]"),
        ("BSH", "'BSH'"),
        (None, "None"),
    ],
)
def test_an_error_names_operator_argument_value_and_what_is_supported(value: Any, text: str) -> None:
    assert str(checks.invalid("npu_x", "x", value, "y")) == f"npu::npu_x: x is {text}; supported: y"


@pytest.mark.parametrize("op", UNSUPPORTED)
def test_arguments_that_are_not_implemented_may_have_their_defaults_alone(op: str) -> None:
    checks.reject_unsupported(op, dict(UNSUPPORTED[op]))
    for name, default in UNSUPPORTED[op].items():
        for value in (torch.zeros(1), "another"):
            with pytest.raises(ValueError, match=rf"^npu::{op}: {name} is .*; supported: only the default"):
                checks.reject_unsupported(op, {**UNSUPPORTED[op], name: value})
        assert not isinstance(default, torch.Tensor)


def test_a_number_that_equals_the_default_is_the_default() -> None:
    checks.reject_unsupported("npu_dequant_swiglu_quant", {"clamp_limit": float("7"), "swiglu_mode": 0.0})


def test_an_argument_that_the_schema_does_not_have_is_no_value_error() -> None:
    with pytest.raises(TypeError, match=r"^npu::npu_quant_matmul has no argument 'warp_drive'$"):
        checks.reject_unsupported("npu_quant_matmul", {"warp_drive": None})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool]
)
def test_dtypes(dtype: torch.dtype) -> None:
    tensor, takes = torch.zeros(1, dtype=dtype), dtype in checks.FLOAT_DTYPES
    if takes:
        checks.check_float("npu_x", "x", tensor)
    else:
        with pytest.raises(ValueError, match="supported: dtype float32, bfloat16 or float16"):
            checks.check_float("npu_x", "x", tensor)
    checks.check_same_dtype("npu_x", tensor, y=tensor, z=tensor)
    other = torch.zeros(1, dtype=torch.int64)
    for others in ({"y": other, "z": tensor}, {"y": tensor, "z": other}):
        name = next(name for name, value in others.items() if value is other)
        with pytest.raises(ValueError, match=rf"^npu::npu_x: {name} is .*; supported: the dtype of the first input"):
            checks.check_same_dtype("npu_x", tensor, **others)


def test_only_a_plain_tensor_of_the_cpu_is_read() -> None:
    plain = torch.zeros(2)
    assert checks.is_plain(plain)
    assert checks.is_readable(torch.nn.Parameter(plain))
    for other in (plain.to("meta"), plain.as_subclass(type("Other", (torch.Tensor,), {}))):
        assert not checks.is_plain(other)
        assert not checks.is_readable(other)


def test_nothing_is_plain_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not checks.is_plain(torch.zeros(2))
    assert not checks.is_readable(torch.zeros(2))


@pytest.mark.skipif(ACCELERATOR is None, reason="needs an NPU or a GPU")
def test_a_tensor_of_an_accelerator_is_plain_and_not_read() -> None:
    tensor = torch.zeros(2, device=ACCELERATOR)
    assert checks.is_plain(tensor)
    assert not checks.is_readable(tensor)
