"""npu_swiglu: one rounding, any dimension, errors."""

from __future__ import annotations

import pytest
import torch

npu = torch.ops.npu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_first_half_gates_the_second(dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(4, 6, 8).to(dtype)
    gate, up = x.float().chunk(2, dim)
    assert torch.equal(npu.npu_swiglu(x, dim), (torch.nn.functional.silu(gate) * up).to(dtype))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"npu::npu_swiglu: input is .* an even size along dim -1"):
        npu.npu_swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="npu::npu_swiglu: dim is 2"):
        npu.npu_swiglu(torch.zeros(2, 8), 2)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        npu.npu_swiglu(torch.zeros(2, 8, dtype=torch.int32))
