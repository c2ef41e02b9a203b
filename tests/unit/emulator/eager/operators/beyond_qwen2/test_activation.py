"""Activations against their formulas in float64, with gradients through torch_npu's own autograd."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu


def gelu(x, tanh=False):
    if tanh:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def silu(x):
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize(
    ("operator", "formula"),
    [
        (npu.fast_gelu, lambda x: x / (1 + torch.exp(-1.702 * x))),
        (npu.npu_fast_gelu, lambda x: x / (1 + torch.exp(-1.702 * x))),
        (npu.npu_silu, silu),
        (npu.npu_mish, lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
        (npu.npu_gelu, gelu),
        (npu.npu_swiglu, lambda x: silu(x[..., :4]) * x[..., 4:]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_activations(operator, formula):
    check(operator, formula, draw(3, 8), differentiate=[0], meta=operator is npu.npu_swiglu)


def test_gelu_by_tanh():
    check(npu.npu_gelu, lambda x, approximate: gelu(x, True), draw(3, 8), approximate="tanh", differentiate=[0])


def test_silu_in_place():
    x = draw(5, grad=False).npu()
    expected = silu(x.cpu().double())
    assert npu.npu_silu_(x) is x
    torch.testing.assert_close(x.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tanh", [0, 1])
def test_geglu(left, tanh):
    def formula(x, dim, approximate, activate_left):
        first, second = x.chunk(2, dim)
        active, other = (first, second) if activate_left else (second, first)
        active = gelu(active, bool(approximate))
        return other * active, active

    check(npu.npu_geglu, formula, draw(2, 6), -1, tanh, left, differentiate=[0])


def test_gelu_mul():
    check(npu.npu_gelu_mul, lambda x: gelu(x[..., :3]) * x[..., 3:], draw(2, 6, grad=False))


def test_clipped_swiglu():
    def formula(x):
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)

    check(npu.npu_clipped_swiglu, formula, (draw(4, 6) * 5).detach())


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_scaled_masked_softmax(fixed, shape):
    mask = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(1)) < 0.4

    def formula(x, mask, scale, fixed):
        mask = torch.arange(shape[1]) > torch.arange(shape[0]).unsqueeze(1) if fixed else mask
        return torch.softmax((x * scale).masked_fill(mask, -10000.0), -1)

    check(npu.npu_scaled_masked_softmax, formula, draw(2, 3, *shape), mask, 0.5, fixed, differentiate=[0])
