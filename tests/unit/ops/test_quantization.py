"""Operators of 8-bit weights: the product that reads int8, and the sizes that it is not given."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops.quantization import _takes_packed

npu = torch.ops.npu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 96, 64), (3, 896, 32), (16, 64, 160), (17, 64, 32), (2, 1, 5)]
)
def test_a_transposed_weight(rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, inner).to(dtype), torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    scale = (torch.rand(columns) / 127).to(dtype)
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale)
    exact = (x.double() @ weight.double().T) * scale.double()
    size = (x.double().abs() @ weight.double().abs().T) * scale.double()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * size).all()
    assert _takes_packed(x, weight.mT) == (inner >= 64 and rows <= 16 and dtype != torch.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_in_float32_err_no_more_than_an_ordinary_product(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 896), torch.randint(-127, 128, (512, 896), dtype=torch.int8)
    scale, added = torch.rand(512) / 127, torch.randn(512) if bias else None
    exact = torch.nn.functional.linear(
        x.double(), weight * scale.double()[:, None], None if added is None else added.double()
    )
    plain = torch.nn.functional.linear(x, weight * scale[:, None], added)
    ours = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale, bias=added)
    ours_error, plain_error = ((y.double() - exact).square().mean().sqrt() for y in (ours, plain))
    assert ours_error <= 1.5 * plain_error


def test_fake_tensors_tell_the_shape() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(4, 3584).bfloat16(), torch.empty(4608, 3584, dtype=torch.int8)
        assert npu.npu_weight_quant_batchmatmul(x, weight.mT, torch.empty(4608).bfloat16()).shape == (4, 4608)


def test_the_head_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"npu_weight_quant_batchmatmul: weight .*152064.* at most 65535: keep such a head"
    ):
        npu.npu_weight_quant_batchmatmul(
            torch.zeros(1, 8), torch.zeros(8, 152064, dtype=torch.int8), torch.zeros(152064)
        )


def test_a_bias_is_added_before_rounding() -> None:
    x, weight = torch.randn(1, 896).bfloat16(), torch.randint(-127, 128, (64, 896), dtype=torch.int8)
    scale, bias = (torch.rand(64) / 127).bfloat16(), torch.randn(64) * 50
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale, bias=bias)
    exact = (x.double() @ weight.double().T) * scale.double() + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-3)
