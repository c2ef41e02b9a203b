"""GE operators of several ranks: three threads of this process, one communicator each, against numpy.

``tests/unit/emulator/collectives`` has them in processes of their own, behind torch_npu's process groups.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.emulator.collectives import library
from qwen2_npu.emulator.collectives.communicator import Communicator
from qwen2_npu.emulator.collectives.reduction import COMPUTED_IN, OPERATIONS
from qwen2_npu.emulator.ge.engine import Program
from qwen2_npu.emulator.ge.operators import collectives
from qwen2_npu.emulator.ge.operators.table import TABLE
from qwen2_npu.emulator.ge.proto import parse
from tests.unit.emulator.collectives.threads import SIZE, communicators, on_all
from tests.unit.emulator.ge.building import Make, build, ge

Tensor = torch.Tensor
Run = Callable[..., list[list[Tensor]]]

GROUP = "of_threads"
FLOAT32, INT64 = 0, 9
"""GE's numbers of dtypes."""

REDUCE: dict[str, Callable[..., Any]] = {"sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min}


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Communicator]]:
    with communicators(GROUP) as made:
        yield made


@pytest.fixture
def run(ranks: list[Communicator], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Computes one graph on all ranks, or one on each, from one input each; the outputs of every rank."""
    here = threading.local()

    def find(name: str) -> Communicator:
        assert name == GROUP
        return here.communicator

    monkeypatch.setattr(collectives, "find", find)
    monkeypatch.setattr(library, "find", find)

    def compute(make: Make | Sequence[Make], inputs: list[Tensor]) -> list[list[Tensor]]:
        makes = make if isinstance(make, Sequence) else [make] * SIZE
        protos = [build(one, x) for one, x in zip(makes, inputs, strict=True)]

        def on(rank: int) -> list[Tensor]:
            here.communicator = ranks[rank]
            return Program.plan("test", parse(protos[rank])).run([inputs[rank]])

        return on_all(on)

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
    found = run(lambda x: ge.HcomBroadcast([x, ge.Neg(x)], root_rank=root, group=GROUP), inputs)
    assert all(torch.equal(y, inputs[root]) and torch.equal(z, -inputs[root]) for y, z in found)


def numbers(*values: int) -> Any:
    return ge.Const(list(values), dtype=INT64)


def test_all_gather_of_unequal_parts(run: Run) -> None:
    counts = [1, 3, 2]
    inputs = [x[:count] for x, count in zip(operands(), counts, strict=True)]
    found = run(lambda x: ge.HcomAllGatherV(x, numbers(0), numbers(*counts), None, group=GROUP), inputs)
    assert all(torch.equal(y, torch.cat(inputs)) for (y,) in found)


def test_all_to_all_of_unequal_parts(run: Run) -> None:
    """What rank i sends to rank j is not what rank j sends to rank i."""
    matrix = np.array([[1, 2, 0], [3, 1, 2], [2, 0, 4]])
    inputs = [x[: rows.sum()] for x, rows in zip(operands(), matrix, strict=True)]
    elements = matrix * inputs[0].shape[1]
    zeros = [0] * SIZE

    def make(rank: int) -> Make:
        sent, received = numbers_of(elements[rank]), numbers_of(elements[:, rank])
        return lambda x: ge.HcomAllToAllV(x, sent(), numbers(*zeros), received(), numbers(*zeros), group=GROUP)

    found = run([make(rank) for rank in range(SIZE)], inputs)
    for rank, (y,) in enumerate(found):
        parts = [x.split(rows.tolist())[rank] for x, rows in zip(inputs, matrix, strict=True)]
        assert torch.equal(y, torch.cat(parts))


def numbers_of(values: Any) -> Callable[[], Any]:
    return lambda: numbers(*values.tolist())


def test_messages_find_their_receivers_by_rank_and_tag(run: Run) -> None:
    """Around a ring: of two messages, the second one sent is received first."""
    inputs = operands()
    shape = list(inputs[0].shape)

    def make(rank: int) -> Make:
        def of(x: Any) -> list[Any]:
            for tag, value in ((1, x), (2, ge.Neg(x))):
                ge.HcomSend(value, group=GROUP, sr_tag=tag, dest_rank=(rank + 1) % SIZE)
            return [
                ge.HcomReceive(group=GROUP, sr_tag=tag, src_rank=(rank - 1) % SIZE, shape=shape, dtype=FLOAT32)
                for tag in (2, 1)
            ]

        return of

    found = run([make(rank) for rank in range(SIZE)], inputs)
    for rank, (second, first) in enumerate(found):
        assert torch.equal(first, inputs[rank - 1])
        assert torch.equal(second, -inputs[rank - 1])


@pytest.mark.parametrize("gathers", [True, False])
def test_products_with_a_collective_are_rounded_once(run: Run, gathers: bool) -> None:
    """64 · 32 + 1 is not a number of float16, and with the bias of 1 it is."""
    inputs = [torch.tensor([[64.0, 1.0]] * SIZE).mul(rank + 1).half() for rank in range(SIZE)]
    weight, bias = torch.tensor([[32.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0])
    named = {"group": GROUP, "rank_size": SIZE}

    def make(x: Any) -> list[Any]:
        w, b = (ge.Cast(ge.Const(value.tolist(), dtype=FLOAT32), dst_type=1) for value in (weight, bias))
        product, whole = ge.AllGatherMatmul(x, w, b, is_gather_out=gathers, **named)
        return [product, whole, ge.MatmulReduceScatter(x, w, b, **named)]

    each = [(x.double() @ weight.double() + bias.double()).half() for x in inputs]
    for rank, (product, whole, part) in enumerate(run(make, inputs)):
        assert torch.equal(product, torch.cat(each))
        assert torch.equal(whole, torch.cat(inputs) if gathers else whole.new_empty(0))
        assert torch.equal(part, sum(x.double() for x in each)[rank : rank + 1].half())  # type: ignore[index]


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
