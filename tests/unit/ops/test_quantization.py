"""Operators of 8-bit weights: the product that reads int8, and the sizes that it is not given."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops import quantization
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


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("size", [1.0, 2.0**90, 2.0**-100, 2.0**-126])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_product_by_digits_is_as_exact_as_one_in_float32(
    rows: int, size: float, vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes within a row: a few activations of real models are hundreds of times the others."""
    monkeypatch.setattr(quantization, "_has_vnni", lambda: vnni)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 96), torch.randint(-127, 128, (64, 96), dtype=torch.int8)
    x[:, 3] *= 300
    x, scale = x * size, torch.ones(64)
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale)
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - exact).abs() <= 16 * torch.finfo(torch.float32).eps * bound + 2.0**-140).all()


def test_a_row_of_zeros_and_one_that_is_not_finite() -> None:
    x, weight = torch.ones(4, 64), torch.ones(32, 64, dtype=torch.int8)
    x[0] = 0
    x[1, 5], x[2, 5] = torch.inf, torch.nan
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, torch.ones(32))
    assert torch.equal(y[0], torch.zeros(32))
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3], torch.full((32,), 64.0))


def test_int32_is_not_scaled() -> None:
    x, weight = (
        torch.randint(-127, 128, (3, 64), dtype=torch.int8),
        torch.randint(-127, 128, (40, 64), dtype=torch.int8),
    )
    bias = torch.randint(-9, 9, (40,), dtype=torch.int32)
    exact = x.int() @ weight.int().T
    for scale in (torch.full((40,), 5.0), torch.ones(1, dtype=torch.bfloat16)):
        y = npu.npu_quant_matmul(x, weight.mT, scale, bias=bias, output_dtype=torch.int32)
        assert y.dtype == torch.int32
        assert torch.equal(y, exact + bias)


@pytest.mark.parametrize("strides", [(64, 1), (1, 1), (7, 1)])
def test_one_row_of_any_stride(strides: tuple[int, int]) -> None:
    memory = torch.randint(-127, 128, (64,), dtype=torch.int8)
    weight = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    y = npu.npu_quant_matmul(memory.as_strided((1, 64), strides), weight.mT, torch.ones(32), output_dtype=torch.int32)
    assert torch.equal(y[0], weight.int() @ memory.int())


def test_one_position_of_several_in_a_compiled_graph() -> None:
    """What last_layer does with rows that the norm has quantised."""
    values, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((1, 8, 64), (32, 64)))
    index = torch.tensor([[7]])

    def function(values: torch.Tensor) -> torch.Tensor:
        one = values.gather(1, index[:, :, None].expand(1, 1, 64))
        return npu.npu_quant_matmul(one.reshape(-1, 64), weight.mT, torch.ones(32), output_dtype=3)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(function)(values), function(values))
