"""Gradients taken inside a kernel."""

from __future__ import annotations

import torch

from qwen2_npu.emulator.eager.gradients import gradient, gradients


def test_gradients_of_what_is_asked():
    a, b = torch.tensor([2.0]), torch.tensor([3.0])
    assert gradients(torch.mul, (a, b), torch.ones(1)) == (b, a)
    assert gradients(torch.mul, (a, b), torch.ones(1), [False, True]) == (None, a)
    assert gradients(lambda x, y, z: x * y, (a, b, None), torch.ones(1)) == (b, a, None)


def test_several_results_of_which_one_has_no_gradient():
    a = torch.tensor([2.0])
    assert gradients(lambda x: (x * 2, x * x), (a,), (None, torch.ones(1)))[0] == 4
    assert gradients(lambda x: (x * 2, x * x), (a,), (None, None))[0] == 0


def test_below_autograd_and_in_inference_mode():
    a = torch.tensor([2.0])
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        assert gradient(lambda x: x * x, a, torch.ones(1)) == 4
    with torch.inference_mode():
        assert gradient(lambda x: x * x, torch.tensor([2.0]), torch.ones(1)) == 4


def test_the_input_is_left_alone():
    a = torch.tensor([2.0], requires_grad=True)
    gradient(lambda x: x.mul_(3) if not x.requires_grad else x * 3, a, torch.ones(1))
    assert a.grad is None
    assert a.item() == 2
