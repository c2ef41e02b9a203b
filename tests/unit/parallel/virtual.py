"""Several ranks of one model in one process: a thread each, over real gloo groups that no other test sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import quantized, weights
from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard

TIMEOUT = 20.0
"""Seconds. A rank whose others have failed waits no longer."""

ResultT = TypeVar("ResultT")

_numbers = itertools.count()
"""In one process the group of every rank needs a name of its own."""


class Run(Protocol):
    """Calls a function once per rank, all at the same time, and gives the results in the order of the ranks."""

    def __call__(self, function: Callable[[Ranks], ResultT]) -> list[ResultT]: ...


@contextmanager
def virtual_ranks(count: int, timeout: float = TIMEOUT) -> Iterator[Run]:
    """``count`` ranks that live as long as the context.

    Args:
        timeout: seconds that a rank waits for the others; more where they compile, which is one after the other.
    """
    store, number = dist.HashStore(), next(_numbers)

    def join(rank: int) -> Ranks:
        group = dist.ProcessGroup(store, rank, count)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout)
        gloo = dist.ProcessGroupGloo(store, rank, count, options)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        group._set_group_name(f"virtual_{number}_{rank}_of_{count}")
        torch._C._distributed_c10d._register_process_group(group.group_name, group)
        return Ranks(Shard(rank, count), group)

    with ThreadPoolExecutor(count) as pool:
        every = list(pool.map(join, range(count)))

        def run(function: Callable[[Ranks], ResultT]) -> list[ResultT]:
            futures = [pool.submit(function, ranks) for ranks in every]
            # The first failure is the cause: the others' is that they wait for it.
            failed = [future.exception() for future in futures]
            for error in sorted((e for e in failed if e is not None), key=lambda e: "gloo" in str(e).lower()):
                raise error
            return [future.result() for future in futures]

        try:
            yield run
        finally:
            for ranks in every:
                torch._C._distributed_c10d._unregister_process_group(ranks.group.group_name)


def sharded(
    config: Any,
    state: Mapping[str, torch.Tensor],
    ranks: Ranks,
    optimizations: Optimizations | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Any:
    """The part of a model that ``ranks`` say, from the stock tensors in ``state``."""
    source = quantized.present(StateDictSource(config, state))
    target = torch.device(device)
    return weights.build(
        lambda: Qwen2ForCausalLM.of_kind(config)(config, optimizations, ranks), source, dtype=dtype, device=target
    ).eval()
