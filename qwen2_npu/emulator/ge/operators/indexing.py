"""GE operators that copy, gather and scatter."""

from __future__ import annotations

import torch

from qwen2_npu import ops
from qwen2_npu.emulator.ge.operators.table import Ints, Scalar, Tensor, operator
from qwen2_npu.emulator.ge.proto import UnsupportedGraphError

operator("TensorMove")(lambda x: x.clone(memory_format=torch.contiguous_format))


@operator("Assign", fixed={"validate_shape": True, "use_locking": False})
def assign(ref: Tensor, value: Tensor) -> Tensor:
    return ref.copy_(value)


@operator("Scatter", fixed={"reduce": "update"})
def scatter(var: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    return ops.kernels["scatter_update_"](var, indices, updates, axis)


@operator("ScatterPaKvCache", fixed={"scatter_mode": "None", "strides": (1, 1), "offsets": (0, 0)})
def scatter_pa_kv_cache(
    key: Tensor,
    key_cache: Tensor,
    slot_mapping: Tensor,
    value: Tensor,
    value_cache: Tensor,
    compress_lens: Tensor | None = None,
    compress_seq_offset: Tensor | None = None,
    seq_lens: Tensor | None = None,
    *,
    cache_mode: str = "Norm",
) -> tuple[Tensor, Tensor]:
    rest = {"compress_lens": compress_lens, "compress_seq_offsets": compress_seq_offset, "seq_lens": seq_lens}
    ops.kernels["npu_scatter_pa_kv_cache"](
        key, value, key_cache, value_cache, slot_mapping, cache_mode=cache_mode, **rest
    )
    return key_cache, value_cache


@operator("ScatterNdUpdate", fixed={"use_locking": False})
def scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return var.index_put_(tuple(indices.unbind(-1)), updates)


@operator("ViewCopy")
def view_copy(
    dst: Tensor,
    dst_size: Ints,
    dst_stride: Ints,
    dst_storage_offset: Ints,
    src: Tensor,
    src_size: Ints,
    src_stride: Ints,
    src_storage_offset: Ints,
) -> Tensor:
    # GE's tensors are dense, so the strides of src count in its elements in order; the engine's may be views.
    source = src.contiguous().reshape(-1).as_strided(src_size, src_stride, src_storage_offset[0])
    dst.as_strided(dst_size, dst_stride, dst.storage_offset() + dst_storage_offset[0]).copy_(source)
    return dst


@operator("InplaceIndexAdd")
def inplace_index_add(var: Tensor, indices: Tensor, updates: Tensor, alpha: Scalar | None, *, axis: int) -> Tensor:
    return var.index_add_(axis, indices, updates, alpha=1 if alpha is None else alpha)


def _from_the_end(indices: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + size, indices)


@operator("GatherV2", fixed={"batch_dims": 0, "is_preprocessed": False})
def gather_v2(x: Tensor, indices: Tensor, axis: Ints, *, negative_index_support: bool = False) -> Tensor:
    dim = axis[0] % x.dim()
    flat = indices.reshape(-1)
    picked = x.index_select(dim, _from_the_end(flat, x.shape[dim]) if negative_index_support else flat)
    return picked.reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])


@operator("Gather", fixed={"validate_indices": True, "batch_dims": 0, "is_preprocessed": False})
def gather(x: Tensor, indices: Tensor, *, negative_index_support: bool = False) -> Tensor:
    return gather_v2(x, indices, (0,), negative_index_support=negative_index_support)


@operator("GatherElements")
def gather_elements(x: Tensor, index: Tensor, *, dim: int = 0) -> Tensor:
    return torch.gather(x, dim, index)


@operator("ScatterElements")
def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    index = _from_the_end(indices, data.shape[axis]).to(torch.int64)
    if reduction == "none":
        return torch.scatter(data, axis, index, updates)
    if reduction == "add":
        return torch.scatter_add(data, axis, index, updates)
    raise UnsupportedGraphError(f"GE operator ScatterElements with reduction={reduction!r} is not emulated")


@operator("IndexByTensor")
def index_by_tensor(x: Tensor, indices: list[Tensor], *, indices_mask: tuple[int, ...] = ()) -> Tensor:
    left = iter(indices)
    return x[tuple(next(left) if present else slice(None) for present in indices_mask)]
