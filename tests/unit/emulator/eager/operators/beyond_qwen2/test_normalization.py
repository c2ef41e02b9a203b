"""Norms against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import check, draw

npu = torch.ops.npu


def statistics(x, dims=(-1,), eps=1e-5):
    mean = x.mean(dims, keepdim=True)
    return mean, ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()


def layer_norm(x, gamma, beta, eps=1e-5):
    mean, rstd = statistics(x, eps=eps)
    return (x - mean) * rstd * gamma + beta, mean, rstd


def rms(x, eps=1e-6):
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradient(dtype):
    x, gamma = draw(2, 3, 8, dtype=dtype), draw(8, dtype=dtype)
    check(npu.npu_rms_norm, lambda x, gamma: (x * rms(x) * gamma, rms(x)), x, gamma)
    if dtype is torch.float32:
        check(npu.npu_rms_norm, lambda x, gamma: (x * rms(x) * gamma, rms(x)), x, gamma, differentiate=[0])


@pytest.mark.parametrize("normed", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_norms_over_several_dimensions(normed):
    """The weight has as many dimensions as are normed; its gradient is summed over all others."""
    dims, x, more = list(range(-len(normed), 0)), draw(2, 3, 4), draw(2, 3, 4, seed=5)
    gamma, beta = draw(*normed), draw(*normed, seed=2)

    def rms_norm(x, gamma):
        rstd = (x.square().mean(dims, keepdim=True) + 1e-6).rsqrt()
        return x * rstd * gamma, rstd

    def add_layer_norm(x1, x2, gamma, beta):
        mean, rstd = statistics(x1 + x2, dims)
        return (x1 + x2 - mean) * rstd * gamma + beta, mean, rstd, None

    check(npu.npu_rms_norm, rms_norm, x, gamma, differentiate=[0], meta=False)
    check(npu.npu_add_layer_norm, add_layer_norm, x, more, gamma, beta, differentiate=[0], meta=False)


def test_gemma_rms_norm():
    def formula(x, gamma):
        return x * rms(x) * (1 + gamma), rms(x)

    check(npu.npu_gemma_rms_norm, formula, draw(2, 8, grad=False), draw(8, grad=False))


@pytest.mark.parametrize("with_sum", [False, True])
def test_add_layer_norm(with_sum):
    def formula(x1, x2, gamma, beta, eps, more):
        y, mean, rstd = layer_norm(x1 + x2, gamma, beta, eps)
        return y, mean, rstd, x1 + x2 if with_sum else None

    arguments = draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8), draw(8, seed=2)
    check(
        npu.npu_add_layer_norm,
        formula,
        *arguments,
        1e-5,
        with_sum,
        differentiate=[0, 3] if with_sum else [0],
        meta=with_sum,
    )


def test_deep_norm():
    def formula(x, gx, beta, gamma, alpha):
        y, mean, rstd = layer_norm(alpha * x + gx, gamma, beta, 1e-6)
        return mean, rstd, y

    check(npu.npu_deep_norm, formula, draw(4, 8), draw(4, 8, seed=1), draw(8), draw(8, seed=2), 0.3, differentiate=[2])


def group_norm(x, groups, weight, bias, eps=1e-5):
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, rstd = statistics(grouped, eps=eps)
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = ((grouped - mean) * rstd).reshape(x.shape) * weight.view(shape) + bias.view(shape)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def test_group_norm_swish():
    def formula(x, groups, weight, bias, eps, scale):
        y, mean, rstd = group_norm(x, groups, weight, bias, eps)
        return y / (1 + torch.exp(-scale * y)), mean, rstd

    check(npu.npu_group_norm_swish, formula, draw(2, 6, 5), 3, draw(6), draw(6, seed=1), 1e-5, 1.5, differentiate=[0])


def test_group_norm_silu():
    def formula(x, weight, bias, groups):
        y, mean, rstd = group_norm(x, groups, weight, bias)
        return y / (1 + torch.exp(-y)), mean, rstd

    check(
        npu.npu_group_norm_silu, formula, draw(2, 6, 5, grad=False), draw(6, grad=False), draw(6, seed=1, grad=False), 3
    )


def test_layer_norm_eval():
    def formula(x, shape, weight, bias):
        return layer_norm(x, weight, bias)[0]

    check(
        npu.npu_layer_norm_eval, formula, draw(2, 8, grad=False), [8], draw(8, grad=False), draw(8, seed=1, grad=False)
    )
