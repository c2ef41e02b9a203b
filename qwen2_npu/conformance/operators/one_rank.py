"""A process group of one rank, for the operators that hold a collective: no default group, and no other process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "qwen2_npu_one_rank_{}"


_LOCK = threading.Lock()

_GROUPS: dict[str, ProcessGroup] = {}


def group(device_type: str) -> ProcessGroup:
    """The group of this process alone, whose tensors are on ``device_type``: "cpu", "cuda" or "npu".

    ``destroy_process_group`` of any group makes torch forget the names of all: it is told this one's again.
    """
    import torch

    registry: Any = torch._C._distributed_c10d
    name = NAME.format(device_type)
    with _LOCK:
        if name not in _GROUPS:
            _GROUPS[name] = _made(device_type, name)
        try:
            registry._resolve_process_group(name)
        except RuntimeError:
            registry._register_process_group(name, _GROUPS[name])
        return _GROUPS[name]


def _made(device_type: str, name: Any) -> ProcessGroup:
    import torch
    import torch.distributed as dist

    store = dist.HashStore()
    backend, kind = _backend(device_type, dist.PrefixStore(name, store))
    made = dist.ProcessGroup(store, 0, 1)
    made._register_backend(torch.device(device_type), kind, backend)
    made._set_group_name(name)
    return made


def communicator_name(device: str) -> str:
    """``hcom`` of the group of one rank for tensors on ``device``."""
    import torch

    from qwen2_npu.ops import mm_all_reduce

    where = torch.device(device)
    return mm_all_reduce.communicator_name(group(where.type), where)


def _backend(device_type: str, store: Any) -> tuple[Any, Any]:
    import torch.distributed as dist

    kinds = dist.ProcessGroup.BackendType
    if device_type == "npu":
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        return ProcessGroupHCCL(store, 0, 1, ProcessGroupHCCL.Options()), kinds.CUSTOM
    if device_type == "cuda":
        return dist.ProcessGroupNCCL(store, 0, 1, dist.ProcessGroupNCCL.Options()), kinds.NCCL
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, 0, 1, options), kinds.GLOO
