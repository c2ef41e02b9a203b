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


def test_gamma_may_span_all_dimensions() -> None:
    x, gamma = torch.randn(4, 8), torch.randn(4, 8)
    y, rstd = npu.npu_rms_norm(x, gamma)
    assert rstd.shape == (1, 1)
    torch.testing.assert_close(y.double(), x.double() * (x.double().square().mean() + 1e-6).rsqrt() * gamma.double())


@pytest.mark.parametrize("shape", [(4,), (7,), (9,), (), (3, 8), (1, 2, 8)], ids=str)
def test_gamma_has_the_trailing_dimensions(shape: tuple[int, ...]) -> None:
    x, gamma = torch.zeros(2, 8), torch.zeros(shape)
    for op, name, arguments in (("npu_rms_norm", "input", (x,)), ("npu_add_rms_norm", "x1", (x, x))):
        message = rf"^npu::{op}: gamma is a torch.float32 tensor of shape .*trailing dimensions of {name}, .* \(2, 8\)$"
        with pytest.raises(ValueError, match=message):
            getattr(npu, op)(*arguments, gamma)


def test_dtypes_that_are_not_taken() -> None:
    x, gamma = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"npu_rms_norm: input is .*float64.* float32, bfloat16 or float16"):
        npu.npu_rms_norm(x.double(), gamma.double())
    with pytest.raises(ValueError, match=r"npu_add_rms_norm: x1 is .*float64.* float32, bfloat16 or float16"):
        npu.npu_add_rms_norm(x.double(), x.double(), gamma.double())
    with pytest.raises(ValueError, match=r"npu_rms_norm: gamma is .* the dtype of the first input"):
        npu.npu_rms_norm(x, gamma.half())
    half = gamma.half()
    for x2, other, name in ((x, half, "gamma"), (x.half(), gamma, "x2"), (x.half(), half, "x2")):
        with pytest.raises(ValueError, match=f"npu_add_rms_norm: {name} is .* the dtype of the first input"):
            npu.npu_add_rms_norm(x, x2, other)


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (2, 2, 8)], ids=str)
def test_add_rms_norm_wants_equal_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x2 is .* supported: the shape of x1, \(2, 8\)"):
        npu.npu_add_rms_norm(torch.zeros(2, 8), torch.zeros(shape), torch.zeros(8))


def test_add_rms_norm_takes_no_fp32_gamma_of_halves() -> None:
    with pytest.raises(ValueError, match="gamma is"):
        npu.npu_add_rms_norm(torch.zeros(2, 8).half(), torch.zeros(2, 8).half(), torch.zeros(8))
