"""GE operators that other ranks take part in. ``group`` is the name that ``get_hccl_comm_name`` gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen2_npu.emulator.collectives import operators
from qwen2_npu.emulator.collectives.communicator import Communicator, Message
from qwen2_npu.emulator.collectives.library import find
from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator
from qwen2_npu.emulator.ge.proto import attribute_dtype


@operator("HcomAllReduce")
def all_reduce(x: Tensor, *, reduction: str, group: str, fusion: int = 1, fusion_id: int = -1) -> Tensor:
    return _ranks(x, group).all_reduce(_flat(x), reduction).view(x.shape)


@operator("HcomAllGather")
def all_gather(x: Tensor, *, rank_size: int, group: str, fusion: int = 0, fusion_id: int = -1) -> Tensor:
    return _rows(_ranks(x, group, rank_size).all_gather(_flat(x)), x)


@operator("HcomAllGatherV")
def all_gather_v(
    x: Tensor, send_count: Ints, recv_counts: Ints, recv_displacements: Ints | None, *, group: str
) -> Tensor:
    row = _row(x)
    return _rows(find(group).all_gather(_flat(x), [row * count for count in recv_counts]), x)


@operator("HcomReduceScatter")
def reduce_scatter(
    x: Tensor, *, reduction: str, group: str, rank_size: int, fusion: int = 0, fusion_id: int = -1
) -> Tensor:
    return _rows(_ranks(x, group, rank_size).reduce_scatter(_flat(x), reduction), x)


@operator("HcomReduceScatterV")
def reduce_scatter_v(
    x: Tensor, recv_count: Ints, send_counts: Ints, send_displacements: Ints | None, *, reduction: str, group: str
) -> Tensor:
    row = _row(x)
    return _rows(find(group).reduce_scatter(_flat(x), reduction, [row * count for count in send_counts]), x)


@operator("HcomBroadcast")
def broadcast(
    x: list[Tensor], *, root_rank: int, group: str, fusion: int = 0, fusion_id: int = -1
) -> tuple[Tensor, ...]:
    return tuple(_ranks(one, group).broadcast(_flat(one), root_rank).view(one.shape) for one in x)


@operator("HcomAllToAll")
def all_to_all(x: Tensor, *, group: str) -> Tensor:
    return find(group).all_to_all(_flat(x)).view(x.shape)


@operator("HcomAllToAllV")
def all_to_all_v(
    send_data: Tensor,
    send_counts: Ints,
    send_displacements: Ints,
    recv_counts: Ints,
    recv_displacements: Ints,
    *,
    group: str,
) -> Tensor:
    """Counts are in elements. torchair's displacements follow from them: parts lie one after another."""
    return _rows(find(group).all_to_all(_flat(send_data), send_counts, recv_counts), send_data)


@operator("HcomSend")
def send(x: Tensor, *, group: str, sr_tag: int, dest_rank: int) -> tuple[()]:
    find(group).transfer([Message(receive=False, tensor=_flat(x), peer=dest_rank, tag=sr_tag)])
    return ()


@operator("HcomReceive")
def receive(*, group: str, sr_tag: int, src_rank: int, shape: list[int], dtype: int) -> Tensor:
    y = torch.empty(shape, dtype=attribute_dtype(dtype))
    find(group).transfer([Message(receive=True, tensor=y.reshape(-1), peer=src_rank, tag=sr_tag)])
    return y


NOT_TRANSPOSED = {"is_trans_a": False, "is_trans_b": False}

NOT_QUANTISED = {"antiquant_group_size": 0, "group_size": 0, "comm_quant_mode": 0, "y_dtype": 28, "comm_mode": "ai_cpu"}
"""y_dtype 28: the dtype of x1."""


@operator("MatmulAllReduce", fixed={**NOT_TRANSPOSED, **NOT_QUANTISED})
def matmul_all_reduce(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    *,
    group: str,
    reduce_op: str = "sum",
    comm_turn: int = 0,
) -> Tensor:
    # GE's tensors are dense; the engine's may be views.
    x1, x2 = x1.contiguous(), x2 if x2.mT.is_contiguous() else x2.contiguous()
    return operators.mm_all_reduce(x1, x2, group, reduce_op=reduce_op, bias=bias, x3=x3, comm_turn=comm_turn)


@operator("AllGatherMatmul", fixed=NOT_TRANSPOSED)
def all_gather_matmul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    *,
    group: str,
    gather_index: int = 0,
    comm_turn: int = 0,
    rank_size: int = 0,
    is_gather_out: bool = True,
) -> tuple[Tensor, Tensor]:
    return operators.all_gather_mm(
        x1, x2, group, rank_size, bias=bias, gather_index=gather_index, gather_output=is_gather_out
    )


@operator("MatmulReduceScatter", fixed=NOT_TRANSPOSED)
def matmul_reduce_scatter(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    *,
    group: str,
    reduce_op: str = "sum",
    comm_turn: int = 0,
    rank_size: int = 0,
) -> Tensor:
    return operators.mm_reduce_scatter(x1, x2, group, rank_size, reduce_op=reduce_op, bias=bias)


@dataclass(frozen=True)
class _Shapes:
    """In place of a communicator of ``size`` ranks where there is no data: the shapes of results, nothing exchanged."""

    size: int

    def all_reduce(self, x: Tensor, operation: str) -> Tensor:
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size * x.numel())

    def reduce_scatter(self, x: Tensor, operation: str) -> Tensor:
        return x.new_empty(x.numel() // self.size)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return torch.empty_like(x)


def _ranks(x: Tensor, group: str, size: int = 1) -> Communicator | _Shapes:
    return _Shapes(size) if x.is_meta else find(group)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1)


def _row(x: Tensor) -> int:
    """Elements of one index of the first dimension, in which torchair counts."""
    return x[:1].numel() if x.shape[0] else 1


def _rows(flat: Tensor, like: Tensor) -> Tensor:
    """``flat`` as rows of the shape that ``like`` has."""
    return flat.view(-1, *like.shape[1:])
