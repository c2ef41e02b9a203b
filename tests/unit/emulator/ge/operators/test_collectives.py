"""GE operators of several ranks: three threads of this process, one communicator each, against numpy.

``tests/unit/emulator/collectives`` has them in processes of their own, behind torch_npu's process groups.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist

from qwen2_npu.emulator.collectives.communicator import Communicator
from qwen2_npu.emulator.collectives.reduction import COMPUTED_IN, OPERATIONS
from qwen2_npu.emulator.ge.engine import Program
from qwen2_npu.emulator.ge.operators import collectives
from qwen2_npu.emulator.ge.operators.table import TABLE
from qwen2_npu.emulator.ge.proto import parse
from tests.unit.emulator.ge.building import Make, build, ge

Tensor = torch.Tensor
Run = Callable[..., list[list[Tensor]]]

SIZE = 3
GROUP = "of_threads"
PATIENCE = timedelta(seconds=30)

REDUCE: dict[str, Callable[..., Any]] = {"sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min}


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Communicator]]:
    store = dist.HashStore()
    with ThreadPoolExecutor(SIZE) as pool:
        make = lambda rank: Communicator(GROUP, rank, SIZE, store, PATIENCE, lambda: PATIENCE)  # noqa: E731
        made = list(pool.map(make, range(SIZE)))
    yield made
    for communicator in made:
        communicator.close()


@pytest.fixture
def run(ranks: list[Communicator], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Computes one graph on all ranks, from one input each; the outputs of every rank."""
    here = threading.local()

    def find(name: str) -> Communicator:
        assert name == GROUP
        return here.communicator  # type: ignore[no-any-return]

    monkeypatch.setattr(collectives, "find", find)

    def compute(make: Make, inputs: list[Tensor]) -> list[list[Tensor]]:
        proto = build(make, inputs[0])

        def on(rank: int) -> list[Tensor]:
            here.communicator = ranks[rank]
            return Program.plan("test", parse(proto)).run([inputs[rank]])

        with ThreadPoolExecutor(SIZE) as pool:
            return list(pool.map(on, range(SIZE)))

    return compute


def operands(dtype: torch.dtype = torch.float32, rows: int = 2 * SIZE) -> list[Tensor]:
    """Small numbers other than zero, of both signs: no two reductions of them agree, and products fit int8."""
    values = torch.tensor([-2, 3, 1, -1, 2, 4])
    return [values.repeat(rows, 1).roll(rank, 1).roll(rank, 0).to(dtype) for rank in range(SIZE)]


def exact(inputs: list[Tensor], reduction: str) -> Tensor:
    stacked = np.stack([x.double().numpy() for x in inputs])
    return torch.from_numpy(REDUCE[reduction](stacked, axis=0)).to(inputs[0].dtype)


def test_every_reduction_is_tested() -> None:
    assert REDUCE.keys() == OPERATIONS.keys()
    results = [exact(operands(), reduction) for reduction in REDUCE]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("reduction", OPERATIONS)
def test_all_reduce(run: Run, reduction: str, dtype: torch.dtype) -> None:
    assert dtype in COMPUTED_IN
    inputs = operands(dtype)
    found = run(lambda x: ge.HcomAllReduce(x, reduction=reduction, group=GROUP), inputs)
    assert all(torch.equal(y, exact(inputs, reduction)) for (y,) in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("reduction", OPERATIONS)
def test_reduce_scatter(run: Run, reduction: str, dtype: torch.dtype) -> None:
    inputs = operands(dtype)
    found = run(lambda x: ge.HcomReduceScatter(x, reduction=reduction, group=GROUP, rank_size=SIZE), inputs)
    for (y,), part in zip(found, exact(inputs, reduction).chunk(SIZE), strict=True):
        assert torch.equal(y, part)


@pytest.mark.parametrize("reduction", OPERATIONS)
def test_reduce_scatter_of_unequal_parts(run: Run, reduction: str) -> None:
    inputs, counts = operands(), [1, 2, 3]

    def make(x: Any) -> Any:
        of_all = ge.Const(counts, dtype=9)
        return ge.HcomReduceScatterV(x, ge.Const([0], dtype=9), of_all, None, reduction=reduction, group=GROUP)

    for (y,), part in zip(run(make, inputs), exact(inputs, reduction).split(counts), strict=True):
        assert torch.equal(y, part)


@pytest.mark.parametrize("root", range(SIZE))
def test_broadcast(run: Run, root: int) -> None:
    inputs = operands()
    found = run(lambda x: ge.HcomBroadcast([x], root_rank=root, group=GROUP), inputs)
    assert all(torch.equal(y, inputs[root]) for (y,) in found)


def test_all_gather_and_all_to_all(run: Run) -> None:
    inputs = operands()
    found = run(lambda x: [ge.HcomAllGather(x, rank_size=SIZE, group=GROUP), ge.HcomAllToAll(x, group=GROUP)], inputs)
    for rank, (gathered, exchanged) in enumerate(found):
        assert torch.equal(gathered, torch.cat(inputs))
        assert torch.equal(exchanged, torch.cat([x.chunk(SIZE)[rank] for x in inputs]))


@pytest.mark.parametrize("type_", ["HcomAllReduce", "HcomReduceScatter"])
def test_a_reduction_that_is_ignored_is_seen(run: Run, type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TABLE[type_]

    def always_sum(x: Tensor, **attributes: Any) -> Tensor:
        result: Tensor = entry.function(x, **{**attributes, "reduction": "sum"})
        return result

    monkeypatch.setitem(TABLE, type_, dataclasses.replace(entry, function=always_sum))
    test = test_all_reduce if type_ == "HcomAllReduce" else test_reduce_scatter
    test(run, "sum", torch.float32)
    for reduction in OPERATIONS.keys() - {"sum"}:
        with pytest.raises(AssertionError):
            test(run, reduction, torch.float32)
