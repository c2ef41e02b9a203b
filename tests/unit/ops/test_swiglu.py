"""npu_swiglu: one rounding, any dimension, errors."""

from __future__ import annotations

import pytest
import torch

from tests.unit.ops.support import Recorder

npu = torch.ops.npu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [-3, -1, 0, 1, 2])
def test_first_half_gates_the_second(dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(4, 6, 8).to(dtype)
    gate, up = x.float().chunk(2, dim)
    assert torch.equal(npu.npu_swiglu(x, dim), (torch.nn.functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "calls"), [(torch.float32, ["silu", "mul_"]), (torch.bfloat16, ["_to_copy", "silu_", "mul_", "_to_copy"])]
)
def test_no_tensor_is_made_but_the_result_and_its_float32(dtype: torch.dtype, calls: list[str]) -> None:
    x = torch.randn(4, 8).to(dtype)
    with Recorder() as recorder:
        npu.npu_swiglu(x)
    assert [call.name for call in recorder.calls if call.name != "split"] == calls


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"npu::npu_swiglu: input is .* an even size along dim -1"):
        npu.npu_swiglu(torch.zeros(2, 7))
    for dim in (2, -3):
        with pytest.raises(ValueError, match=rf"npu::npu_swiglu: dim is {dim}; .* whose shape is \(2, 8\)"):
            npu.npu_swiglu(torch.zeros(2, 8), dim)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        npu.npu_swiglu(torch.zeros(2, 8, dtype=torch.int32))
