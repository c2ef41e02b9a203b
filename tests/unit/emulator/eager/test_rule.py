"""The boxed rule: what is shared, what is copied, what is refused."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "npu"


def on_both(function):
    """Results of ``function(device)`` on the NPU, held against the CPU's."""
    expected, found = function("cpu"), function(DEVICE)
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == DEVICE
        assert one.stride() == other.stride()
        torch.testing.assert_close(one.cpu(), other)


def test_views_share_memory_with_their_base():
    def run(device):
        x = torch.arange(24.0).reshape(4, 6).to(device)
        part = x[1:3, ::2]
        part.mul_(2)
        part.t()[0] += 1
        x.view(-1)[3:9].zero_()
        x[:, 1] = 7
        x[x > 20] = -1
        x.diagonal().add_(0.5)
        return [x, part, x.unfold(1, 3, 2), *x.split(3, 1), x.T, x.unsqueeze(0).squeeze(), x.expand(2, 4, 6)]

    on_both(run)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.uint8])
def test_views_of_another_dtype_share_memory(dtype):
    x = torch.randn(4, 4, device=DEVICE)
    view = x.view(dtype)
    assert torch.equal(view.view(torch.uint8).cpu(), x.cpu().view(torch.uint8))
    view.zero_()
    assert x.abs().sum() == 0


def test_real_and_imaginary_parts_and_conjugates():
    x = torch.randn(3, dtype=torch.complex64, device=DEVICE)
    assert torch.equal((x.conj() * 2).cpu(), x.cpu().conj() * 2)
    assert torch.equal(x.conj().imag.cpu(), x.cpu().conj().imag)
    assert torch.equal((x.conj().imag + 0).cpu(), x.cpu().conj().imag + 0)
    torch.view_as_real(x).zero_()
    x.real.fill_(2)
    assert torch.equal(x.cpu(), torch.full((3,), 2, dtype=torch.complex64))


def test_in_place_results_are_the_very_tensor():
    x = torch.ones(3, device=DEVICE)
    assert x.add_(1) is x
    out = torch.empty(3, device=DEVICE)
    assert torch.add(x, x, out=out) is out


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 2)])
def test_an_output_takes_the_shape_of_the_result(shape):
    x = torch.arange(6.0, device=DEVICE).reshape(2, 3)
    out = torch.empty(shape, device=DEVICE)
    if out.numel():
        with pytest.warns(UserWarning, match="resized"):
            torch.mul(x, 2, out=out)
    else:
        torch.mul(x, 2, out=out)
    assert torch.equal(out.cpu(), x.cpu() * 2)


def test_two_outputs():
    x = torch.randn(4, 5, device=DEVICE)
    values, indices = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert torch.sort(x, out=(values, indices))[0] is values
    assert torch.equal(values.cpu(), x.cpu().sort().values)
    assert torch.equal(indices.cpu(), x.cpu().sort().indices)


def test_operands_that_overlap():
    on_both(lambda device: [(x := torch.arange(9.0).reshape(3, 3).to(device)).add_(x.t().clone()), x.mul_(x)])
    x = torch.arange(4.0, device=DEVICE)
    with pytest.raises(RuntimeError, match="single memory location"):
        x[1:].add_(x[:-1])


def test_empty_scalar_and_expanded_tensors():
    def run(device):
        empty, scalar = torch.empty(0, 3).to(device), torch.tensor(2.0).to(device)
        wide = scalar.expand(2, 3)
        return [empty + 1, empty.sum(0), scalar * scalar, wide + wide, torch.cat([empty, wide]), wide.sum()]

    on_both(run)


def test_results_have_the_strides_of_the_cpu_s():
    """Of dense ones; a result that repeats its elements gets memory for each."""

    def run(device):
        x = torch.arange(24.0).reshape(2, 3, 4).to(device)
        images = x.view(1, 2, 3, 4).to(memory_format=torch.channels_last)
        return [x.permute(2, 0, 1) + 1, x.mT.clone(), images.relu(), images.new_empty((1, 2, 3, 4)).copy_(images)]

    on_both(run)


def test_results_outlive_their_operands():
    x = torch.arange(1000.0, device=DEVICE)
    copy, view = x + 0, x[5:]
    del x
    gc.collect()
    torch.npu.empty_cache()
    fresh = [torch.full((1000,), -1.0, device=DEVICE) for _ in range(8)]
    assert copy.sum().item() == view.sum().item() + 10 == 499500
    assert len(fresh) == 8


def test_no_result_is_a_cpu_view_of_device_memory():
    x = torch.arange(4.0, device=DEVICE)
    for result in (x.cpu(), x.to("cpu"), torch.empty(4).copy_(x)):
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_versions_are_counted():
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x.exp()
    before = y._version
    y.add_(1)
    assert y._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_scalar_reads():
    assert torch.tensor(3.5, device=DEVICE).item() == 3.5
    assert torch.tensor(2, dtype=torch.bfloat16, device=DEVICE).item() == 2
    assert torch.tensor(1 + 2j, device=DEVICE).item() == 1 + 2j
    assert [0, 1, 2][torch.tensor(1, device=DEVICE)] == 1
    assert torch.arange(3, device=DEVICE).tolist() == [0, 1, 2]


def test_cards_and_the_host_do_not_mix():
    x, far, host = torch.ones(2, 2, device="npu:0"), torch.ones(2, 2, device="npu:1"), torch.ones(2, 2)
    calls = (
        *(lambda other: x + other, lambda other: x @ other, lambda other: x.add_(other)),
        *(lambda other: torch.cat([x, x, other]), lambda other: torch.add(x, x, out=other)),
    )
    for other, names in ((far, "npu:0 and npu:1"), (host, "npu:0 and cpu")):
        for call in calls:
            with pytest.raises(RuntimeError, match=f"same device.*{names}"):
                call(other)
    assert torch.equal(x + torch.tensor(1.0), x + 1)
    assert torch.equal(x[torch.tensor([0])], x[:1])
    assert torch.equal(far.to("npu:0"), x)
    assert far.add(1).device == torch.device("npu:1")


def test_factories_and_the_current_card():
    with torch.npu.device(1):
        assert torch.ones(2, device=DEVICE).device == torch.device("npu:1")
        assert torch.randn(2, device="npu:2").device == torch.device("npu:2")
    assert torch.arange(3, device=DEVICE).device == torch.device("npu:0")
    assert torch.zeros_like(torch.ones(2, device="npu:1")).device == torch.device("npu:1")
    assert torch.ones(2, device="npu:1").new_full((2,), 3).device == torch.device("npu:1")


def test_the_default_device_may_be_the_npu():
    torch.set_default_device(DEVICE)
    try:
        x = torch.randn(2, 3) @ torch.ones(3, 2)
        assert x.device.type == DEVICE
        assert torch.arange(3).sum().item() == 3
    finally:
        torch.set_default_device(None)


def test_modes_see_the_caller_s_operators_alone():
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **kwargs or {})

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})

    x = torch.ones(3, device=DEVICE)
    with Dispatch():
        torch.add(x, x)
    assert seen == ["aten.add.Tensor"]
    seen.clear()
    with Function(), Function():
        torch.add(x, x)
    assert seen == [torch.add] * 2


def test_autocast_of_the_cpu_leaves_the_npu_alone():
    x = torch.randn(4, 4, device=DEVICE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            torch.mm(x, x), torch.mm(x.cpu().double(), x.cpu().double()).float().npu()
        ) or torch.allclose(torch.mm(x, x).cpu().double(), x.cpu().double() @ x.cpu().double(), rtol=1e-5, atol=1e-5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.mm(x, x).dtype is torch.bfloat16


def test_threads_compute_apart():
    failures = []

    def work(number):
        try:
            with torch.npu.device(number % 2):
                for _ in range(30):
                    x = torch.full((8, 8), float(number), device=DEVICE)
                    assert (x @ x).sum().item() == 512 * number * number
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_storage_that_was_emptied():
    x = torch.ones(4, device=DEVICE)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage of 0 bytes"):
        x + 1
    x.untyped_storage().resize_(16)
    assert x.fill_(2).sum() == 8


def test_the_result_in_place_of_a_set_tensor():
    x = torch.zeros(6, device=DEVICE)
    y = torch.empty(0, device=DEVICE).set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    y.add_(1)
    assert x.tolist() == [0, 0, 1, 1, 1, 1]
