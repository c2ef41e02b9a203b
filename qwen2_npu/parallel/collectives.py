"""What the ranks of a tensor-parallel model say to each other: three collectives, all of them here.

On an NPU they are HCCL's, on a CPU gloo's. They run eagerly and inside compiled graphs: torchair lowers them to
HcomAllReduce and HcomAllGather.

Shapes: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel import launch
from qwen2_npu.parallel.sharding import WHOLE, Shard

FUSED_SIZES = (2, 4, 8)
"""Cards that npu_mm_all_reduce_base takes (CANN's documentation). It takes one as well, which has nothing to sum."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of one model, as one of them sees them.

    Attributes:
        shard: which of them this one is.
        group: the ``torch.distributed`` process group; None where there is one rank, and where the part of a model is
            only looked at: a collective then raises.
        hcom: name of the group's communicator where it is not to be opened.
    """

    shard: Shard = WHOLE
    group: Any = None
    hcom: str | None = None

    def check(self, config: Any, optimizations: Optimizations) -> None:
        """Refuse a model or a step that these ranks cannot share.

        Raises:
            UnsupportedError: heads or columns that they do not divide; a step of several cards on one, or on a number
                that its operator does not take.
        """
        self.shard.check(config)
        if optimizations.mm_all_reduce and self.size not in FUSED_SIZES:
            sizes = ", ".join(map(str, FUSED_SIZES))
            raise UnsupportedError(f"mm_all_reduce with tp_size={self.size}: it takes {sizes} ranks; switch it off")

    @property
    def size(self) -> int:
        return self.shard.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in the dtype of ``tensor``, which is overwritten."""
        if self.size == 1:
            return tensor
        dist.all_reduce(tensor, group=self._required_group())
        return tensor

    def all_gather(self, tensor: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """The ranks' tensors side by side along ``axis``: the same bits on every rank."""
        if self.size == 1:
            return tensor
        axis %= tensor.dim()
        gathered = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_single(gathered, tensor.contiguous(), group=self._required_group())
        shape = list(tensor.shape)
        shape[axis] *= self.size
        return gathered.unflatten(0, (self.size, -1)).movedim(0, axis).reshape(shape)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """What rank 0 holds, written into ``tensor``: the same bits on every rank."""
        if self.size > 1:
            group = self._required_group()
            dist.broadcast(tensor, group=group, group_src=0)
        return tensor

    def communicator(self, device: torch.device) -> str:
        """What operators that compute and communicate call the group. Opens it: all ranks must ask, in eager code."""
        from qwen2_npu.ops.mm_all_reduce import communicator_name

        return self.hcom or communicator_name(self._required_group(), device)

    def _required_group(self) -> Any:
        assert self.group is not None, "a part of a model computes only together with the others: join a process group"
        return self.group


CPU = torch.device("cpu")

ALONE = Ranks()
"""The model on one card: every collective is its argument."""


def current(tp_size: int | None, tp_rank: int | None, device: torch.device = CPU) -> Ranks:
    """The ranks to load a model for.

    Args:
        tp_size: how many ranks; None for those of the process group. Where there is none and a launcher has started
            this process, it joins one; else there is one rank.
        tp_rank: which of them; None for that of this process. One that is given need not be: then the part can be
            looked at, saved or sent, but not computed with.
        device: where the model goes.

    Raises:
        UnsupportedError: ``tp_size`` is not that of the process group.
    """
    if tp_rank is None and tp_size != 1:
        _join(device)
    ready = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if ready else 1
    size = world if tp_size is None else tp_size
    if tp_rank is None and size not in (1, world):
        found = f"the process group has {world}" if ready else "there is no process group"
        raise UnsupportedError(
            f"tp_size={size!r}, and {found}: start as many processes (docs/parallel.md), or pass "
            "tp_rank to load one part"
        )
    if tp_rank is None:
        tp_rank = dist.get_rank() if size > 1 else 0
    shard = Shard(tp_rank, size)
    mine = ready and size == world and tp_rank == dist.get_rank()
    return Ranks(shard, dist.group.WORLD if mine else None)


def _join(device: torch.device) -> None:
    """Join the process group of the launcher that started this process, if there is one and nobody has joined it.

    For scripts of a user: the commands of this package are inside of ``launch.joined``, which watches over the ranks.
    """
    found = launch.launched()
    if not dist.is_available() or dist.is_initialized() or found is None or found.world_size == 1:
        return
    own = launch.own_device(found, device.type)
    launch.set_hccl_timeouts(launch.timeout())
    dist.init_process_group(launch.BACKENDS[own.type], timeout=timedelta(seconds=launch.timeout()))
