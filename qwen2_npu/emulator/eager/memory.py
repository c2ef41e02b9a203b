"""Seeing device memory as CPU tensors, and handing CPU results out as device tensors.

Emulated device memory is host memory, so a CPU tensor over the same bytes costs no copy. Such a view does not keep the
memory alive: the caller holds the npu tensor for as long as the view is used.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false as _dense

Tensor = torch.Tensor

CPU = torch.device("cpu")

_storage_over = torch._C._construct_storage_from_data_pointer
_empty_strided = torch.empty_strided
_move = ctypes.memmove


@cache
def _blank(dtype: torch.dtype) -> Tensor:
    """An empty CPU tensor; views start as copies of it, which is cheaper than making one."""
    return torch.empty(0, dtype=dtype, device=CPU)


@cache
def device_of(index: int) -> torch.device:
    """npu:``index``."""
    return torch.device("npu", index)


_prototypes: dict[tuple[int, torch.dtype], Tensor] = {}
"""(card, dtype) -> an empty tensor there, whose ``new_empty_strided`` costs less than a call that names the device."""


Storages = dict[int, Any]
"""Address -> CPU storage over it: tensors that share memory share it on the CPU, too, where operators check that."""


def cpu_view(tensor: Tensor, storages: Storages | None = None) -> Tensor:
    """A CPU tensor over the memory of an npu tensor: same dtype, shape, strides. Valid while ``tensor`` lives.

    Args:
        storages: of the other arguments of the same call; the one used here is put there.

    Raises:
        RuntimeError: the tensor has elements and its storage has been emptied.
    """
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    dtype = tensor.dtype
    if size:
        pointer = storage.data_ptr()
        over: Any = storages.get(pointer) if storages else None
        if over is None:
            over = _storage_over(pointer, CPU, size)
            if storages is not None:
                storages[pointer] = over
        view = _blank(dtype).data.set_(over, tensor.storage_offset(), tensor.size(), tensor.stride())
    elif tensor.numel():
        raise RuntimeError(f"a tensor of shape {tuple(tensor.size())} has a storage of 0 bytes: it has been emptied")
    else:
        view = _empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device=CPU)
    if tensor.is_neg():
        view = torch._neg_view(view)
    if dtype.is_complex and tensor.is_conj():
        view = torch._conj(view)
    return view


def to_device(result: Tensor, index: int) -> Tensor:
    """A new tensor on card ``index`` with the values, and where it can the strides, of a strided CPU ``result``."""
    if result.is_contiguous() and not result.is_neg() and not (result.is_complex() and result.is_conj()):
        out = empty(result.size(), result.stride(), result.dtype, index)
        count = result.nbytes
        if count:
            _move(out.data_ptr(), result.data_ptr(), count)
        return out
    # Sizes without strides of their own (expanded) cannot be written through; such results become contiguous.
    out = empty(result.size(), (result if _dense(result) else result.contiguous()).stride(), result.dtype, index)
    cpu_view(out).copy_(result)
    return out


def empty(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    """An uninitialised tensor on card ``index``, from torch_npu's allocator."""
    prototype = _prototypes.get((index, dtype))
    if prototype is None:
        prototype = _prototypes[index, dtype] = torch.empty(0, dtype=dtype, device=device_of(index))
    return prototype.new_empty_strided(size, stride)


def replace(target: Tensor, result: Tensor) -> None:
    """Give ``target`` (npu) the shape, strides and values of a CPU ``result`` in other memory, as resizing would."""
    target.resize_(result.size())
    if target.stride() != result.stride() and _dense(result):
        target.as_strided_(result.size(), result.stride())
    cpu_view(target).copy_(result)


def _forget_after_fork() -> None:
    _prototypes.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
