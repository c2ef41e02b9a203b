"""Losses and gradients that torch_npu computes by operators of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.unit.emulator.eager.operators.harness import check, draw, on_npu

npu = torch.ops.npu


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(reduction, smoothing):
    target = torch.tensor([1, 0, 3, 2, 1])

    def formula(x, target, weight, reduction, ignore_index, label_smoothing):
        loss = F.cross_entropy(x, target, weight, None, ignore_index, None, reduction, label_smoothing)
        return loss if reduction == "none" else loss.view(1), F.log_softmax(x, -1), None, None

    weight = torch.tensor([0.5, 1.0, 0.25, 0.75])
    arguments = draw(5, 4), target, weight, reduction, 3, smoothing
    check(npu.npu_cross_entropy_loss, formula, *arguments, differentiate=[0], meta=False)


def test_softmax_cross_entropy_with_logits():
    labels = torch.softmax(draw(3, 4, seed=2, grad=False), -1)

    def formula(x, labels):
        return -(labels * torch.log_softmax(x, -1)).sum(-1)

    check(npu.npu_softmax_cross_entropy_with_logits, formula, draw(3, 4), labels, differentiate=[0])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", ["l1_loss", "kl_div", "binary_cross_entropy_with_logits"])
def test_gradients_of_torchs_losses(loss, reduction):
    x, target = draw(3, 4), torch.rand(3, 4, generator=torch.Generator().manual_seed(3))

    def gradient(x, target):
        return torch.autograd.grad(getattr(F, loss)(x, target, reduction=reduction).square().sum(), x)[0]

    found = gradient(x.detach().npu().requires_grad_(), target.npu())
    torch.testing.assert_close(found.cpu().double(), gradient(x.double(), target.double()), rtol=1e-5, atol=1e-6)


WEIGHTS = {"weight": torch.linspace(0.5, 2, 12).view(3, 4), "pos_weight": torch.linspace(1, 3, 4)}


@pytest.mark.parametrize(
    ("loss", "which", "given"),
    [
        (F.kl_div, 0, {"log_target": True, "reduction": "sum"}),
        (F.kl_div, 1, {"log_target": True, "reduction": "sum"}),
        (F.binary_cross_entropy_with_logits, 0, WEIGHTS),
    ],
)
def test_options_of_losses_reach_their_gradients(loss, which, given):
    def gradient(given, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return torch.autograd.grad(loss(*leaves, **given), leaves[which])[0].cpu()

    leaves = [draw(3, 4, seed=seed) for seed in (0, 1)]
    found = gradient(*on_npu((given, *leaves)))
    torch.testing.assert_close(found, gradient(given, *leaves), rtol=1e-5, atol=1e-6)


def test_z_loss_is_refused():
    with pytest.raises(NotImplementedError, match="z-loss"):
        npu.npu_cross_entropy_loss(torch.ones(2, 3).npu(), torch.tensor([0, 1]).npu(), return_zloss=True)
