"""npu_rms_norm and npu_add_rms_norm: their two rounding orders, shapes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

npu = torch.ops.npu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rstd_of(x: Tensor, epsilon: float) -> Tensor:
    return (x.double().square().mean(-1, keepdim=True) + epsilon).rsqrt().float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    x, gamma = torch.randn(3, 5, 64).to(dtype), torch.randn(64).to(dtype)
    y, rstd = npu.npu_rms_norm(x, gamma, 1e-6)
    assert rstd.shape == (3, 5, 1)
    assert rstd.dtype == torch.float32
    torch.testing.assert_close(rstd, rstd_of(x, 1e-6), rtol=1e-6, atol=0)
    assert torch.equal(y, (x.float() * rstd * gamma.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_rounds_the_sum_then_the_norm_then_the_product(dtype: torch.dtype) -> None:
    x1, x2, gamma = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype), torch.randn(64).to(dtype)
    y, rstd, x = npu.npu_add_rms_norm(x1, x2, gamma, 1e-6)
    assert torch.equal(x, (x1.float() + x2.float()).to(dtype))
    torch.testing.assert_close(rstd, rstd_of(x, 1e-6), rtol=1e-6, atol=0)
    assert torch.equal(y, ((x.float() * rstd).to(dtype).float() * gamma.float()).to(dtype))


def test_the_two_orders_differ_in_bf16() -> None:
    x, gamma = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    once, _ = npu.npu_rms_norm(x, gamma)
    twice, _, _ = npu.npu_add_rms_norm(x, torch.zeros_like(x), gamma)
    assert not torch.equal(once, twice)
    torch.testing.assert_close(once, twice, rtol=2e-2, atol=1e-3)


def test_gamma_may_span_several_dimensions() -> None:
    x, gamma = torch.randn(3, 4, 8), torch.randn(4, 8)
    y, rstd = npu.npu_rms_norm(x, gamma)
    assert rstd.shape == (3, 1, 1)
    torch.testing.assert_close(y, x * (x.square().mean((1, 2), keepdim=True) + 1e-6).rsqrt() * gamma)


def test_rms_norm_takes_fp32_gamma() -> None:
    y, _ = npu.npu_rms_norm(torch.randn(2, 8).bfloat16(), torch.randn(8))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "gamma", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(4), "gamma is a torch.float32 tensor of shape"),
        (torch.zeros(2, 8), torch.zeros(()), "gamma"),
        (torch.zeros(2, 8).double(), torch.zeros(8).double(), "input .* float32, bfloat16 or float16"),
        (torch.zeros(2, 8), torch.zeros(8).half(), "gamma .* the dtype of the first input"),
    ],
)
def test_errors(x: Tensor, gamma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"npu::npu_rms_norm: {message}"):
        npu.npu_rms_norm(x, gamma)


def test_add_rms_norm_wants_equal_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"x2 is .* supported: the shape of x1, \(2, 8\)"):
        npu.npu_add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(8))
    with pytest.raises(ValueError, match="gamma is"):
        npu.npu_add_rms_norm(torch.zeros(2, 8).half(), torch.zeros(2, 8).half(), torch.zeros(8))
