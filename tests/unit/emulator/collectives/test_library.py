"""HCCL's C functions, called as torch_npu calls them: from three threads, one rank each, and held against numpy.

``test_collectives.py``, one folder up, has them behind torch_npu's process groups, in processes of their own: too slow
for the fast lane.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu import emulator

if not emulator.is_active() or importlib.util.find_spec("torch_npu") is None:
    pytest.skip("needs emulated cards in this process", allow_module_level=True)

from qwen2_npu.emulator import runtime
from qwen2_npu.emulator.collectives import library
from tests.unit.emulator.collectives.threads import SIZE, communicators, on_all

INT32, SUM, MAX = 2, 0, 2
"""HCCL's numbers."""

LENGTH, UNTOUCHED = 16, 0

UNEVEN, GAPS = [1, 3, 2], [7, 0, 4]
"""Elements per rank, and where they begin: in another order than the ranks, with gaps between."""

MATRIX = np.array([[1, 2, 0], [3, 1, 2], [2, 0, 4]])
"""What rank i sends to rank j; it is not what rank j sends to rank i."""


def sent_by(rank: int) -> np.ndarray[Any, Any]:
    """No rank has the largest numbers everywhere."""
    return np.roll(np.arange(1, LENGTH + 1), 5 * rank) * (rank + 1)


class Rank:
    """One rank's side: its communicator as C knows it, and what it sends and receives."""

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.comm = rank, library.Comm(number, rank, SIZE, b"three")
        self.send = torch.from_numpy(sent_by(rank)).int()
        self.receive = torch.full((LENGTH,), UNTOUCHED, dtype=torch.int32)
        self.kept: list[Any] = []

    def numbers(self, values: Any) -> Any:
        """As C takes them; ``forget`` overwrites them."""
        self.kept.append((ctypes.c_uint64 * len(values))(*map(int, values)))
        return self.kept[-1]

    def forget(self) -> None:
        for numbers in self.kept:
            ctypes.memset(numbers, 0, ctypes.sizeof(numbers))

    def call(self, name: str, *arguments: Any) -> None:
        given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        given = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in given]
        code = getattr(runtime.library(), name)(*given, ctypes.byref(self.comm), None)
        assert code == 0, f"{name}: {code}"


def parts(counts: Sequence[int], begins: Sequence[int]) -> list[slice]:
    return [slice(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]


def placed(pieces: Sequence[Any], begins: Sequence[int]) -> np.ndarray[Any, Any]:
    """A received tensor with ``pieces`` in it."""
    whole = np.full(LENGTH, UNTOUCHED)
    for piece, begin in zip(pieces, begins, strict=True):
        whole[begin : begin + len(piece)] = piece
    return whole


ALL = [sent_by(rank) for rank in range(SIZE)]
SENDS = {  # rank -> how many elements go to each other one, and where they begin
    rank: (MATRIX[rank], [6, 0, 11]) for rank in range(SIZE)
}


def all_to_all_v(r: Rank) -> None:
    (sends, begins), receives = SENDS[r.rank], MATRIX[:, r.rank]
    r.call(
        *("HcclAlltoAllV", r.send, r.numbers(sends), r.numbers(begins), INT32),
        *(r.receive, r.numbers(receives), r.numbers([10, 0, 5]), INT32),
    )


def exchanged(rank: int, begins: Callable[[int], Sequence[int]]) -> list[Any]:
    """What each rank has for ``rank``."""
    return [ALL[i][parts(MATRIX[i], begins(i))[rank]] for i in range(SIZE)]


CASES: dict[str, tuple[Callable[[Rank], None], Callable[[int], np.ndarray[Any, Any]]]] = {
    "all_reduce": (
        lambda r: r.call("HcclAllReduce", r.send, r.receive, 9, INT32, MAX),
        lambda rank: placed([np.max(ALL, 0)[:9]], [0]),
    ),
    "reduce": (
        lambda r: r.call("HcclReduce", r.send, r.receive, 9, INT32, SUM, 1),
        lambda rank: placed([np.sum(ALL, 0)[:9]] if rank == 1 else [[]], [0]),
    ),
    "broadcast": (
        lambda r: r.call("HcclBroadcast", r.receive.copy_(r.send), 9, INT32, 2),
        lambda rank: np.concatenate([ALL[2][:9], ALL[rank][9:]]),
    ),
    "all_gather": (
        lambda r: r.call("HcclAllGather", r.send, r.receive, 4, INT32),
        lambda rank: placed([each[:4] for each in ALL], [0, 4, 8]),
    ),
    "all_gather_v": (
        lambda r: r.call(
            "HcclAllGatherV", r.send, UNEVEN[r.rank], r.receive, r.numbers(UNEVEN), r.numbers(GAPS), INT32
        ),
        lambda rank: placed([each[:count] for each, count in zip(ALL, UNEVEN, strict=True)], GAPS),
    ),
    "reduce_scatter": (
        lambda r: r.call("HcclReduceScatter", r.send, r.receive, 4, INT32, MAX),
        lambda rank: placed([np.max(ALL, 0)[4 * rank : 4 * rank + 4]], [0]),
    ),
    "reduce_scatter_v": (
        lambda r: r.call(
            *("HcclReduceScatterV", r.send, r.numbers(UNEVEN), r.numbers(GAPS)),
            *(r.receive, UNEVEN[r.rank], INT32, MAX),
        ),
        lambda rank: placed([np.max(ALL, 0)[parts(UNEVEN, GAPS)[rank]]], [0]),
    ),
    "scatter": (
        lambda r: r.call("HcclScatter", r.send, r.receive, 4, INT32, 1),
        lambda rank: placed([ALL[1][4 * rank : 4 * rank + 4]], [0]),
    ),
    "all_to_all": (
        lambda r: r.call("HcclAlltoAll", r.send, 4, INT32, r.receive, 4, INT32),
        lambda rank: placed([each[4 * rank : 4 * rank + 4] for each in ALL], [0, 4, 8]),
    ),
    "all_to_all_v": (
        all_to_all_v,
        lambda rank: placed(exchanged(rank, lambda i: SENDS[i][1]), [10, 0, 5]),
    ),
    "all_to_all_vc": (
        lambda r: r.call("HcclAlltoAllVC", r.send, r.numbers(MATRIX.ravel()), INT32, r.receive, INT32),
        lambda rank: placed([np.concatenate(exchanged(rank, lambda i: [0, *MATRIX[i].cumsum()[:-1]]))], [0]),
    ),
}
"""Name -> the call, and what is received then."""


@pytest.fixture(scope="module")
def numbers() -> Iterator[list[list[int]]]:
    """Two communicators: of each, what C calls every rank's."""
    with communicators("three") as first, communicators("again") as second:
        found = [[1001 + SIZE * which + rank for rank in range(SIZE)] for which in range(2)]
        for which, made in enumerate((first, second)):
            library._open.update(zip(found[which], made, strict=True))
        yield found
        for number in (*found[0], *found[1]):
            del library._open[number]


@pytest.mark.parametrize("when", ["at once", "replayed"])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_receives_its_part(
    name: str, when: str, numbers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay sends what the memory of the capture holds then; of C's arrays of numbers nothing is left."""
    call, expected = CASES[name]
    here = threading.local()
    if when == "replayed":
        monkeypatch.setattr(library, "recorder", lambda action: here.actions.append(action))

    def on(rank: int) -> list[int]:
        own, here.actions = Rank(rank, numbers[0][rank]), []
        if when == "replayed":
            own.send.neg_()
        call(own)
        own.forget()
        if when == "replayed":
            own.send.neg_()
            own.receive.neg_()  # a broadcast sends what is there
        for action in here.actions:
            action()
        return own.receive.tolist()

    assert on_all(on) == [expected(rank).tolist() for rank in range(SIZE)]


def test_every_kind_of_call_is_tested() -> None:
    assert {f"_{name}" for name in CASES} | {"_barrier"} == {kind.__name__ for kind in library.KINDS}


class Item(ctypes.Structure):
    """HcclSendRecvItem."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("dtype", ctypes.c_int32),
        ("peer", ctypes.c_uint32),
    )


def test_sends_and_receives_of_a_batch_wait_for_none_of_their_own(numbers: list[list[int]]) -> None:
    """Every rank receives before it sends, around a ring."""

    def on(rank: int) -> list[int]:
        own = Rank(rank, numbers[0][rank])
        before, after = (rank - 1) % SIZE, (rank + 1) % SIZE
        items = [Item(1, own.receive.data_ptr(), 5, INT32, before), Item(0, own.send.data_ptr(), 5, INT32, after)]
        code = runtime.library().HcclBatchSendRecv((Item * 2)(*items), 2, ctypes.byref(own.comm), None)
        assert code == 0
        return own.receive[:5].tolist()

    assert on_all(on) == [ALL[rank - 1][:5].tolist() for rank in range(SIZE)]


def test_a_group_may_span_communicators(numbers: list[list[int]]) -> None:
    """Each rank's first call receives what the next one's second call sends, in another communicator."""

    def on(rank: int) -> list[int]:
        sides = [Rank(rank, each[rank]) for each in numbers]
        first, second = sides if rank == 0 else reversed(sides)
        runtime.library().HcclGroupStart()
        if rank < 2:
            first.call("HcclRecv", first.receive, 5, INT32, 1 - rank)
            second.call("HcclSend", second.send, 5, INT32, 1 - rank)
        assert (first.receive == UNTOUCHED).all()
        assert runtime.library().HcclGroupEnd() == 0
        return first.receive[:5].tolist()

    assert on_all(on) == [ALL[1][:5].tolist(), ALL[0][:5].tolist(), [UNTOUCHED] * 5]


def test_what_was_sent_may_be_overwritten(numbers: list[list[int]]) -> None:
    def on(rank: int) -> list[int]:
        own = Rank(rank, numbers[0][rank])
        if rank == 0:
            own.call("HcclSend", own.send, 5, INT32, 1)
            own.send.zero_()
        own.call("HcclBarrier")
        if rank == 1:
            own.call("HcclRecv", own.receive, 5, INT32, 0)
        return own.receive[:5].tolist()

    assert on_all(on)[1] == ALL[0][:5].tolist()


@pytest.mark.parametrize(
    ("known", "seconds"),
    [({"mine": 7, "group_name_0": 5}, 7), ({"group_name_0": 5, "group_name_1": 3}, 5), ({}, 1836)],
    ids=["its own", "the default group's", "HCCL's"],
)
def test_a_communicator_waits_as_long_as_its_process_group(
    known: dict[str, int], seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "timeouts", {name: timedelta(seconds=each) for name, each in known.items()})
    here, info, config = (
        runtime.library(),
        ctypes.create_string_buffer(4108),
        ctypes.create_string_buffer(bytes(32) + b"mine", 512),
    )
    handle = ctypes.POINTER(library.Comm)()
    assert here.HcclGetRootInfo(info) == 0
    assert here.HcclCommInitRootInfoConfig(1, info, 0, config, ctypes.byref(handle)) == 0
    try:
        assert library.find("mine")._timeout() == timedelta(seconds=seconds)
    finally:
        assert here.HcclCommDestroy(handle) == 0
    assert all(comm.name != "mine" for comm in library.communicators())
