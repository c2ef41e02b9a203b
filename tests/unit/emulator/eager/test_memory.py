"""CPU views of device memory, and device tensors of CPU results."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.emulator.eager import memory


def test_views_have_the_shape_strides_and_memory_of_the_tensor():
    x = torch.arange(12.0, device="npu").reshape(3, 4)[1:, ::2]
    view = memory.cpu_view(x)
    assert (view.shape, view.stride(), view.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
    assert view.data_ptr() == x.data_ptr()
    view.fill_(9)
    assert x.tolist() == [[9, 9], [9, 9]]


def test_tensors_of_one_storage_share_it():
    x = torch.arange(6.0, device="npu")
    storages: memory.Storages = {}
    first, second = memory.cpu_view(x[:3], storages), memory.cpu_view(x[3:], storages)
    assert first.untyped_storage()._cdata == second.untyped_storage()._cdata
    assert len(storages) == 1


@pytest.mark.parametrize(
    "result",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.tensor(3.0).expand(2, 3),
        torch.empty(0, 3),
        torch.tensor(2),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
    ],
)
def test_results_arrive_with_their_values(result):
    found = memory.to_device(result, 1)
    assert found.device == torch.device("npu:1")
    assert torch.equal(found.cpu(), result)
    if result.is_contiguous():
        assert found.stride() == result.stride()


def test_a_tensor_takes_another_shape():
    x = torch.zeros(2, device="npu")
    memory.replace(x, torch.arange(6.0).reshape(2, 3).t())
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert x.stride() == (1, 3)
