"""The pieces of SyncBatchNorm, put together for two halves of a batch as two cards would, against the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.unit.emulator.eager.operators.harness import draw

EPS, MOMENTUM = 1e-5, 0.1


def pieces():
    x = draw(6, 3, 4, grad=False)
    return x, [part.npu() for part in (x[:2], x[2:])]


def test_forward_and_running_statistics():
    x, parts = pieces()
    weight, bias = draw(3, grad=False), draw(3, seed=1, grad=False)
    mean, invstd = (torch.stack(found) for found in zip(*(torch.batch_norm_stats(p, EPS) for p in parts), strict=True))
    counts = torch.tensor([p.numel() / 3 for p in parts]).npu()
    running = torch.zeros(3).npu(), torch.ones(3).npu()
    whole = torch.batch_norm_gather_stats_with_counts(parts[0], mean, invstd, *running, MOMENTUM, EPS, counts)
    found = [torch.batch_norm_elemt(p, weight.npu(), bias.npu(), *whole, EPS).cpu() for p in parts]
    expected_running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = F.batch_norm(x.double(), *expected_running, weight.double(), bias.double(), True, MOMENTUM, EPS)
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(running, expected_running, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-6)


def test_sums_give_the_same_statistics():
    _, parts = pieces()
    sums, squares = (
        torch.stack(s) for s in zip(*(torch.ops.npu.batch_norm_reduce(p, EPS) for p in parts), strict=True)
    )
    counts = torch.tensor([p.numel() / 3 for p in parts]).npu()
    mean, invstd = torch.ops.npu.batch_norm_gather_stats_update(parts[0], sums, squares, None, None, 0.1, EPS, counts)
    whole = torch.batch_norm_stats(torch.cat(parts), EPS)
    torch.testing.assert_close(mean, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(invstd, whole[1], rtol=1e-5, atol=1e-6)


def test_backward():
    x, parts = pieces()
    weight = draw(3, grad=False)
    grads = draw(6, 3, 4, seed=3, grad=False)
    leaf, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.batch_norm(leaf, None, None, wide_weight, torch.zeros(3, dtype=torch.float64), True, 0.1, EPS)
    expected = torch.autograd.grad(y, [leaf, wide_weight], grads.double())
    mean, invstd = torch.batch_norm_stats(torch.cat(parts), EPS)
    halves = [(part, grad.npu()) for part, grad in zip(parts, (grads[:2], grads[2:]), strict=True)]
    reduced = [torch.batch_norm_backward_reduce(g, p, mean, invstd, weight.npu(), True, True, True) for p, g in halves]
    sum_dy, sum_dy_xmu, by_weight, _ = (sum(found) for found in zip(*reduced, strict=True))
    counts = torch.tensor([8, 16], dtype=torch.int32).npu()
    found = [
        torch.batch_norm_backward_elemt(g, p, mean, invstd, weight.npu(), sum_dy, sum_dy_xmu, counts) for p, g in halves
    ]
    torch.testing.assert_close(torch.cat(found).cpu().double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_weight.cpu().double(), expected[1], rtol=1e-4, atol=1e-5)


def test_halves_with_a_float32_weight():
    """The results by channel are in the weight's dtype, or that of the statistics; those by element in the input's."""
    x = draw(4, 3, 5, dtype=torch.bfloat16, grad=False).npu()
    weight = draw(3, grad=False).npu()
    mean, invstd = torch.batch_norm_stats(x, EPS)
    for given in (weight, None):
        found = torch.batch_norm_backward_reduce(x, x, mean, invstd, given, True, True, True)
        assert {value.dtype for value in found} == {torch.float32}
    assert {value.dtype for value in torch.ops.npu.batch_norm_reduce(x, EPS)} == {torch.float32}
    assert torch.batch_norm_elemt(x, weight, weight, mean, invstd, EPS).dtype is torch.bfloat16
