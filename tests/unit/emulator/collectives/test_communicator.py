"""A communicator that is disturbed, or that waits in vain; what it computes is in test_library.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from qwen2_npu.emulator.collectives import faults
from qwen2_npu.emulator.collectives.communicator import Communicator, Message
from qwen2_npu.emulator.collectives.errors import CollectiveError, HcclResult
from tests.unit.emulator.collectives.threads import SIZE, communicators, on_all

X = torch.tensor([3.0, -2.0, 5.0])

CALLS: dict[str, Callable[[Communicator], Any]] = {
    "all_reduce": lambda comm: comm.all_reduce(X),
    "reduce": lambda comm: comm.all_reduce(X, "sum", "reduce"),
    "reduce_scatter": lambda comm: comm.reduce_scatter(X),
    "broadcast": lambda comm: comm.broadcast(X, 1),
    "all_gather": lambda comm: comm.all_gather(X),
    "scatter": lambda comm: comm.scatter(X, 1, 1),
    "all_to_all": lambda comm: comm.all_to_all(X),
    "barrier": lambda comm: comm.barrier(),
    "receive": lambda comm: comm.transfer([Message(True, X.clone(), 1)]),
}
"""What the name of a fault says -> the call that it strikes."""


@pytest.fixture
def impatient() -> Iterator[list[Communicator]]:
    """They wait for one another for a moment only."""
    with communicators("impatient", timedelta(seconds=0.05)) as made:
        yield made


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_nobody_answers_ends_with_the_timeout_and_names_itself(
    name: str, impatient: list[Communicator]
) -> None:
    begin = time.monotonic()
    with pytest.raises(
        CollectiveError, match=rf"^{name} on rank 0 in group 'impatient' \(0 of 3\): no answer"
    ) as failed:
        CALLS[name](impatient[0])
    assert failed.value.code is HcclResult.TIMEOUT
    assert time.monotonic() - begin < 5
    with pytest.raises(CollectiveError, match=f"unusable since then: {name} on rank 0") as again:
        CALLS["all_reduce"](impatient[0])
    assert again.value.code is HcclResult.UNAVAIL


@pytest.mark.parametrize(("kind", "code"), [("fail", HcclResult.REMOTE), ("hang", HcclResult.TIMEOUT)])
@pytest.mark.parametrize("name", CALLS)
def test_a_fault_strikes_the_call_of_its_name_and_ends_the_communicator(
    name: str, kind: str, code: HcclResult, impatient: list[Communicator]
) -> None:
    with (
        faults.inject(kind, collective=name),
        pytest.raises(CollectiveError, match=f"^{name} on rank 0 .*by injection") as failed,
    ):
        CALLS[name](impatient[0])
    assert failed.value.code is code
    with pytest.raises(CollectiveError, match=r"unusable since then: .*by injection"):
        CALLS["barrier"](impatient[0])


def test_a_rank_that_is_left_out_contributes_nothing() -> None:
    def messages(comm: Communicator) -> torch.Tensor:
        got = torch.ones(3)
        comm.transfer([Message(True, got, (comm.rank - 1) % SIZE), Message(False, X, (comm.rank + 1) % SIZE)])
        return got

    reductions = {"sum": 0.0, "prod": 1.0, "max": torch.finfo().min, "min": torch.finfo().max}
    zeros = (CALLS["broadcast"], CALLS["all_gather"], CALLS["scatter"], CALLS["all_to_all"], messages)

    def on(call: Callable[..., torch.Tensor], rank: int) -> torch.Tensor:
        return call(made[rank])

    with communicators("whole") as made, faults.inject("drop"):
        for call in zeros:
            assert all(not found.any() for found in on_all(partial(on, call)))
        for operation, nothing in reductions.items():
            found = on_all(partial(on, partial(Communicator.all_reduce, x=X, operation=operation)))
            assert all((each == nothing).all() for each in found)


def test_ranks_may_give_parts_of_unlike_sizes() -> None:
    with communicators("unlike") as made:
        for gathered in on_all(lambda rank: made[rank].all_gather(torch.full((rank,), float(rank)), [0, 1, 2])):
            assert gathered.tolist() == [1, 2, 2]
        for rank, part in enumerate(
            on_all(lambda rank: made[rank].reduce_scatter(torch.arange(3.0), "sum", [0, 1, 2]))
        ):
            assert part.tolist() == [[], [0], [3, 6]][rank]
