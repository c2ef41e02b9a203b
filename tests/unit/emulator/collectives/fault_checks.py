"""Negative controls: the checks see a disturbed collective, and one that fails or hangs says who waited for whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qwen2_npu.emulator.collectives import faults
from tests.unit.emulator.collectives import eager_checks, model_checks
from tests.unit.emulator.collectives.eager_checks import refused
from tests.unit.emulator.collectives.harness import check, rank, size, slow_check

NPU = torch.device("npu")


def seen(disturbed: Callable[[], None]) -> None:
    """The check ``disturbed`` fails on every rank."""
    with pytest.raises(AssertionError, match="is not"):
        disturbed()


@check
def a_dropped_contribution_is_seen() -> None:
    with faults.inject("drop", rank=size() - 1, collective="all_reduce"):
        seen(eager_checks.asynchronous_work)
    with faults.inject("drop", rank=size() - 1, collective="all_gather"):
        seen(eager_checks.functional_collectives)
    eager_checks.asynchronous_work()


@slow_check
def a_dropped_contribution_is_seen_in_a_graph() -> None:
    with faults.inject("drop", rank=size() - 1, collective="reduce_scatter"):
        seen(model_checks.graph_of_collectives)


@check
def a_failure_names_its_rank() -> None:
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.ones(3, device=NPU)
    dist.all_reduce(x, group=group)
    with faults.inject("fail", rank=0, collective="all_reduce", nth=2):
        dist.all_reduce(x, group=group)
        if rank() == 0:
            said = ("error code is 21", "RankID:0", "all_reduce on rank 0", "failed by injection")
        else:
            said = ("error code is 9", f"all_reduce on rank {rank()}", "no answer from the other ranks")
        refused(lambda: dist.all_reduce(x, group=group), *said)
    refused(lambda: dist.all_reduce(x, group=group), "unusable since then")
    assert np.isfinite(x.cpu().numpy()).all()


@check
def a_hang_ends_with_the_timeout_of_its_group() -> None:
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.ones(3, device=NPU)
    dist.all_reduce(x, group=group)
    begin = time.monotonic()
    with faults.inject("hang", rank=0, collective="broadcast"):
        said = "hung by injection" if rank() == 0 else "no answer from the other ranks in 1"
        refused(lambda: dist.broadcast(x, 0, group=group), "error code is 9", f"broadcast on rank {rank()}", said)
    assert 0.9 <= time.monotonic() - begin <= 5
