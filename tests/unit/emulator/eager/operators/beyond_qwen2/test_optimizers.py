"""Fused optimiser steps against the formulas of their documentation in float64."""

from __future__ import annotations

import pytest
import torch

from tests.unit.emulator.eager.operators.harness import draw

npu = torch.ops.npu

LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.99, 1e-8, 0.1


def state():
    return draw(3, 4, grad=False), draw(3, 4, seed=1, grad=False) * 0.1, draw(3, 4, seed=2, grad=False).square()


def moments(m, v, grad):
    return BETA1 * m + (1 - BETA1) * grad, BETA2 * v + (1 - BETA2) * grad * grad


def compare(run, expected):
    out = [value.npu() for value in state()]
    run(out)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_apply_adam(nesterov):
    grad = draw(3, 4, seed=3, grad=False)
    var, m, v = (value.double() for value in state())
    m, v = moments(m, v, grad.double())
    ahead = BETA1 * m + (1 - BETA1) * grad.double() if nesterov else m
    var = var - LR * (1 - BETA2**5) ** 0.5 / (1 - BETA1**5) * ahead / (v.sqrt() + EPS)
    arguments = BETA1**5, BETA2**5, LR, BETA1, BETA2, EPS, grad.npu(), False, nesterov
    compare(lambda out: npu.npu_apply_adam.out(*arguments, out=out), (var, m, v))


@pytest.mark.parametrize(("amsgrad", "maximize"), [(False, False), (True, False), (False, True)])
def test_apply_adam_w(amsgrad, maximize):
    grad, largest = draw(3, 4, seed=3, grad=False), draw(3, 4, seed=4, grad=False).square()
    var, m, v = (value.double() for value in state())
    m, v = moments(m, v, -grad.double() if maximize else grad.double())
    v = torch.maximum(v, largest.double()) if amsgrad else v
    step = m / (1 - BETA1**5) / ((v / (1 - BETA2**5)).sqrt() + EPS)
    var = var - LR * step - LR * DECAY * var
    arguments = BETA1**4, BETA2**4, LR, DECAY, BETA1, BETA2, EPS, grad.npu(), largest.npu(), amsgrad, maximize
    compare(lambda out: npu.npu_apply_adam_w.out(*arguments, out=out), (var, m, v))


@pytest.mark.parametrize(("largest", "norm", "factor"), [(1.0, 2.0, 0.5), (1.0, 0.5, 1.0), (-1.0, 2.0, 1.0)])
def test_bert_apply_adam(largest, norm, factor):
    """The gradient is clipped where its norm is larger than a limit above 0."""
    grad = draw(3, 4, seed=3, grad=False)
    var, m, v = (value.double() for value in state())
    m, v = moments(m, v, grad.double() * factor)
    var = var - LR * (m / (v.sqrt() + EPS) + DECAY * var)
    arguments = LR, BETA1, BETA2, EPS, grad.npu(), largest, norm, DECAY
    compare(lambda out: npu.npu_bert_apply_adam.out(*arguments, out=out), (var, m, v))


def test_non_finite_gradients_are_seen():
    good = [torch.ones(3, device="npu"), torch.zeros(2, device="npu")]
    assert npu._amp_foreach_non_finite_check(good) is False
    assert npu._amp_foreach_non_finite_check([*good, torch.tensor([1.0, float("inf")]).npu()]) is True


def test_functional_forms_name_the_way_out():
    with pytest.raises(NotImplementedError, match="call its out= form"):
        npu.npu_apply_adam(1.0, 1.0, LR, BETA1, BETA2, EPS, torch.ones(2).npu(), False, False)
