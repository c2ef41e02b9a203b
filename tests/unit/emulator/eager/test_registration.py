"""Every operator that torch_npu has for its device is computed, or refused with a reason."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.emulator.eager import registration
from qwen2_npu.emulator.eager.refused import REASONS


def test_the_list_of_refused_operators_is_the_truth():
    unlisted = sorted(registration.refused - REASONS.keys())
    assert not unlisted, "operators without a kernel and without a reason in refused.py"
    stale = sorted(REASONS.keys() - registration.refused)
    assert not stale, "operators that have a kernel now, or that torch_npu lacks"


def test_a_refusal_names_the_operator_and_the_reason():
    x = torch.ones(4, 4, device="npu")
    with pytest.raises(NotImplementedError, match=r"npu\.npu_iou\.default is not supported.*object detection"):
        torch.ops.npu.npu_iou(x, x)


def test_kernels_are_known_by_name():
    assert registration.has_kernel("aten::add")
    assert registration.has_kernel("aten::add.Tensor")
    assert registration.has_kernel("npu::npu_rms_norm")
    assert not registration.has_kernel("npu::npu_iou")
    assert not registration.has_kernel("aten::no_such_operator")


@pytest.mark.parametrize("name", ["one_hot", "lstm", "max", "nanmean"])
def test_composite_operators_that_torch_npu_sends_to_cann(name):
    """Those in ``extra.DECOMPOSED`` do not reach CANN, which would raise."""
    x = torch.randn(3, 4, device="npu")
    calls = {
        "one_hot": lambda: torch.nn.functional.one_hot(torch.tensor([0, 2], device="npu"), 3),
        "lstm": lambda: torch.nn.LSTM(4, 2).npu()(x.unsqueeze(1)),
        "max": lambda: torch.max(x, x + 1, out=torch.empty_like(x)),
        "nanmean": lambda: torch.nanmean(x, 0, out=torch.empty(4, device="npu")),
    }
    calls[name]()
