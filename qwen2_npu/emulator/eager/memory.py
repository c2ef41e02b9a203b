"""Seeing device memory as CPU tensors, and handing CPU results out as device tensors.

Emulated device memory is host memory, so a CPU tensor over the same bytes costs no copy.
"""

from __future__ import annotations

import torch

_CPU = torch.device("cpu")
_storage_over = torch._C._construct_storage_from_data_pointer
_empty = torch.empty
_empty_strided = torch.empty_strided


def cpu_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of an npu tensor: same dtype, shape, strides. Valid while ``tensor`` lives."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    view = _empty(0, dtype=tensor.dtype)
    if size:
        over = _storage_over(storage.data_ptr(), _CPU, size)
        view.set_(over, tensor.storage_offset(), tensor.size(), tensor.stride())
    else:
        view = _empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    if tensor.is_conj():
        view = torch._conj(view)
    if tensor.is_neg():
        view = torch._neg_view(view)
    return view


def to_device(result: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A new tensor on ``device`` with the values and strides of a CPU ``result``."""
    if result.layout is not torch.strided:
        raise RuntimeError(f"the emulated NPU has no {result.layout} tensors")
    out = _empty_strided(result.size(), result.stride(), dtype=result.dtype, device=device)
    if result.numel():
        cpu_view(out).copy_(result)
    return out
