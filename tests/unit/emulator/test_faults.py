"""Each fault acts as it says, once or always, ends with its block, and tells when it never acted."""

from __future__ import annotations

import time

import pytest
import torch

from qwen2_npu.emulator import faults, runtime
from qwen2_npu.emulator.eager import tap
from qwen2_npu.emulator.settings import EmulatorError


@pytest.fixture
def x():
    return torch.ones(4, 4, device="npu")


def test_nan_at_one_call(x):
    with faults.nan("aten::mul", nth=2) as fault:
        results = [x * x for _ in range(3)]
    assert [result.isnan().all().item() for result in results] == [False, True, False]
    assert (fault.calls, fault.happened) == (3, 1)
    assert not (x * x).isnan().any()


def test_a_relative_error_at_every_call(x):
    with faults.perturbed("aten::add.Tensor", 1e-3):
        results = [(x + x)[0, 0].item() for _ in range(2)]
    assert results == pytest.approx([2.002] * 2, rel=1e-6)
    assert (x + x)[0, 0].item() == 2


def test_in_place_operators_are_disturbed_in_place(x):
    with faults.perturbed("aten::add_", 0.5):
        x.add_(1)
    assert x.tolist() == [[3.0] * 4] * 4


def test_integers_are_left_alone():
    with faults.nan("aten::add"):
        assert (torch.ones(2, dtype=torch.int64, device="npu") + 1).tolist() == [2, 2]


def test_operators_of_torch_npu():
    with faults.nan("npu::npu_rms_norm"):
        y, rstd = torch.ops.npu.npu_rms_norm(torch.ones(2, 8, device="npu"), torch.ones(8, device="npu"))
    assert y.isnan().all()
    assert rstd.isnan().all()


def test_a_slow_operator(x):
    with faults.slow("aten::mul", 0.05, nth=1):
        start = time.monotonic()
        x * x
        first = time.monotonic() - start
        x * x
        second = time.monotonic() - start - first
    assert first >= 0.05 > second


def test_out_of_memory_from_the_nth_allocation_on():
    with faults.out_of_memory(nth=2):
        kept = torch.empty(16 << 20, device="npu")
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
                torch.empty(16 << 20, device="npu")
    assert torch.empty(16 << 20, device="npu").numel() == kept.numel()


def test_out_of_memory_counts_the_driver_s_allocations():
    before = runtime.allocations()
    torch.npu.empty_cache()
    torch.empty(16 << 20, device="npu")
    assert runtime.allocations() == before + 1


def test_a_fault_that_never_happened(x):
    with (
        pytest.raises(EmulatorError, match=r"aten::mul never happened: it was called 0 times; .*meanwhile: aten::add"),
        faults.nan("aten::mul"),
    ):
        x + x
    with (
        pytest.raises(EmulatorError, match="called 1 times, and call 5 was to be disturbed"),
        faults.nan("aten::mul", nth=5),
    ):
        x * x
    assert not tap.listeners


def test_an_error_inside_is_not_hidden(x):
    with pytest.raises(ZeroDivisionError), faults.nan("aten::mul"):
        1 / 0  # noqa: B018
    assert not tap.listeners


@pytest.mark.parametrize("operator", ["aten::no_such", "npu::npu_iou", "mul"])
def test_unknown_operators(operator):
    with pytest.raises(EmulatorError, match=f"operator='{operator}': no operator of that name"), faults.nan(operator):
        pass


def test_numbers_of_calls_start_at_one():
    with pytest.raises(ValueError, match="nth=0"), faults.nan("aten::mul", nth=0):
        pass
    with pytest.raises(ValueError, match="nth=0"), faults.out_of_memory(0):
        pass
