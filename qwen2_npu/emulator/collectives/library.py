"""HCCL's functions, as ``cann/hccl.c`` calls them: addresses become tensors, and a ``Communicator`` computes."""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_char, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from datetime import timedelta
from functools import partial, wraps
from typing import Any

import torch
from torch import distributed as dist

from qwen2_npu.emulator.collectives import reduction
from qwen2_npu.emulator.collectives.communicator import LOOPBACK, Communicator, Message
from qwen2_npu.emulator.collectives.errors import CollectiveError, HcclResult
from qwen2_npu.emulator.settings import EmulatorError

DTYPES: dict[int, torch.dtype] = {
    0: torch.int8,
    1: torch.int16,
    2: torch.int32,
    3: torch.float16,
    4: torch.float32,
    5: torch.int64,
    6: torch.uint64,
    7: torch.uint8,
    8: torch.uint16,
    9: torch.uint32,
    10: torch.float64,
    11: torch.bfloat16,
    15: torch.float8_e4m3fn,
    16: torch.float8_e5m2,
}
"""HcclDataType -> dtype."""

REDUCTIONS = tuple(reduction.OPERATIONS)
"""HcclReduceOp -> name."""

GROUP_NAME = "group_name_{}"
"""How torch_npu calls the communicator of the process group with an id."""


class Comm(ctypes.Structure):
    """``Comm`` of hccl.c."""

    _fields_ = (("id", c_uint64), ("rank", c_uint32), ("size", c_uint32), ("name", c_char * 128))


class CollectiveCall(ctypes.Structure):
    """``Call`` of hccl.c; counts and offsets are in elements."""

    _fields_ = (
        ("kind", c_int32),
        ("dtype", c_int32),
        ("op", c_int32),
        ("peer", c_uint32),
        ("count", c_uint64),
        ("send", c_void_p),
        ("receive", c_void_p),
        ("send_counts", POINTER(c_uint64)),
        ("send_offsets", POINTER(c_uint64)),
        ("receive_counts", POINTER(c_uint64)),
        ("receive_offsets", POINTER(c_uint64)),
        ("comm", POINTER(Comm)),
    )

    @property
    def reduction(self) -> str:
        return REDUCTIONS[self.op]

    def sent(self, count: int, offset: int = 0) -> torch.Tensor:
        """``count`` elements of what the call sends."""
        return _memory(self.send, self.dtype, count, offset)

    def received(self, count: int, offset: int = 0) -> torch.Tensor:
        """``count`` elements of where the call receives."""
        return _memory(self.receive, self.dtype, count, offset)


def _memory(address: int | None, dtype: int, count: int, offset: int = 0) -> torch.Tensor:
    kind = DTYPES.get(dtype)
    if kind is None:
        raise CollectiveError(HcclResult.NOT_SUPPORT, f"HCCL data type {dtype} is not emulated")
    tensor = torch.empty(0, dtype=kind)
    if not count or not address:
        return tensor
    size = count * kind.itemsize
    storage = torch._C._construct_storage_from_data_pointer(address + offset * kind.itemsize, torch.device("cpu"), size)
    return tensor.set_(storage, 0, (count,), (1,))


# ---- one function per kind of call, in the order of hccl.c's enumeration ----


def _all_reduce(comm: Communicator, call: CollectiveCall) -> None:
    call.received(call.count).copy_(comm.all_reduce(call.sent(call.count), call.reduction))


def _reduce(comm: Communicator, call: CollectiveCall) -> None:
    result = comm.all_reduce(call.sent(call.count), call.reduction, "reduce")
    if comm.rank == call.peer:
        call.received(call.count).copy_(result)


def _broadcast(comm: Communicator, call: CollectiveCall) -> None:
    call.received(call.count).copy_(comm.broadcast(call.sent(call.count), call.peer))


def _all_gather(comm: Communicator, call: CollectiveCall) -> None:
    call.received(comm.size * call.count).copy_(comm.all_gather(call.sent(call.count)))


def _all_gather_v(comm: Communicator, call: CollectiveCall) -> None:
    counts = call.receive_counts[: comm.size]
    _place(call, comm.all_gather(call.sent(call.count), counts), counts, call.receive_offsets[: comm.size])


def _reduce_scatter(comm: Communicator, call: CollectiveCall) -> None:
    call.received(call.count).copy_(comm.reduce_scatter(call.sent(comm.size * call.count), call.reduction))


def _reduce_scatter_v(comm: Communicator, call: CollectiveCall) -> None:
    counts = call.send_counts[: comm.size]
    call.received(call.count).copy_(
        comm.reduce_scatter(_pack(call, counts, call.send_offsets[: comm.size]), call.reduction, counts)
    )


def _scatter(comm: Communicator, call: CollectiveCall) -> None:
    x = call.sent(comm.size * call.count) if comm.rank == call.peer else call.sent(0)
    call.received(call.count).copy_(comm.scatter(x, call.count, call.peer))


def _all_to_all(comm: Communicator, call: CollectiveCall) -> None:
    total = comm.size * call.count
    call.received(total).copy_(comm.all_to_all(call.sent(total)))


def _all_to_all_v(comm: Communicator, call: CollectiveCall) -> None:
    sent, received = call.send_counts[: comm.size], call.receive_counts[: comm.size]
    result = comm.all_to_all(_pack(call, sent, call.send_offsets[: comm.size]), sent, received)
    _place(call, result, received, call.receive_offsets[: comm.size])


def _all_to_all_vc(comm: Communicator, call: CollectiveCall) -> None:
    matrix = call.send_counts[: comm.size**2]
    sent = matrix[comm.rank * comm.size : (comm.rank + 1) * comm.size]
    received = matrix[comm.rank :: comm.size]
    call.received(sum(received)).copy_(comm.all_to_all(call.sent(sum(sent)), sent, received))


def _barrier(comm: Communicator, call: CollectiveCall) -> None:
    comm.barrier()


KINDS: tuple[Callable[[Communicator, CollectiveCall], None], ...] = (
    _all_reduce,
    _reduce,
    _broadcast,
    _all_gather,
    _all_gather_v,
    _reduce_scatter,
    _reduce_scatter_v,
    _scatter,
    _all_to_all,
    _all_to_all_v,
    _all_to_all_vc,
    _barrier,
)
SEND, RECEIVE = len(KINDS), len(KINDS) + 1


def _pack(call: CollectiveCall, counts: list[int], offsets: list[int]) -> torch.Tensor:
    return torch.cat([call.sent(count, offset) for count, offset in zip(counts, offsets, strict=True)])


def _place(call: CollectiveCall, result: torch.Tensor, counts: list[int], offsets: list[int]) -> None:
    for part, count, offset in zip(torch.split(result, counts), counts, offsets, strict=True):
        call.received(count, offset).copy_(part)


# ---- communicators ----

_open: dict[int, Communicator] = {}
_next_id = 1
_roots: dict[bytes, dist.TCPStore] = {}
"""Rendezvous that this process serves, until its communicator takes it over."""

timeouts: dict[str, timedelta] = {}
"""Communicator name -> timeout of its process group. torch_npu does not tell HCCL."""

DEFAULT_TIMEOUT = timedelta(seconds=1836)
"""HCCL's own, for a communicator whose process group is not known."""

CONNECT_SECONDS = 120
"""HCCL's own for the ranks of a new communicator to meet; its variable is HCCL_CONNECT_TIMEOUT."""


def find(name: str) -> Communicator:
    """The communicator that ``get_hccl_comm_name`` calls ``name``.

    Raises:
        CollectiveError: there is none in this process.
    """
    for comm in _open.values():
        if comm.name == name:
            return comm
    known = ", ".join(repr(comm.name) for comm in _open.values()) or "none"
    raise CollectiveError(
        HcclResult.NOT_FOUND,
        f"no HCCL communicator is called {name!r} (known: {known}): pass what "
        "group._get_backend(torch.device('npu')).get_hccl_comm_name(rank) returns",
    )


def _root_info(info: Any) -> None:
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    text = f"{LOOPBACK}:{store.port}".encode()
    _roots[text] = store
    ctypes.memmove(info, text + b"\0", len(text) + 1)


def _open_comm(handle: Any, info: Any) -> None:
    global _next_id
    record = handle.contents
    where = ctypes.string_at(info)
    name = record.name.decode() or f"emulated_{where.decode()}"
    record.name = name.encode()

    def timeout() -> timedelta:
        return timeouts.get(name) or timeouts.get(GROUP_NAME.format(0)) or DEFAULT_TIMEOUT

    patience = timedelta(seconds=int(os.environ.get("HCCL_CONNECT_TIMEOUT", CONNECT_SECONDS)))
    store = _roots.pop(where, None)
    try:
        if store is None:
            host, _, port = where.decode().rpartition(":")
            store = dist.TCPStore(host, int(port), is_master=False, timeout=patience)
        comm = Communicator(name, record.rank, record.size, store, patience, timeout)
    except RuntimeError as error:
        raise CollectiveError(
            HcclResult.TIMEOUT,
            f"rank {record.rank} of {record.size} of communicator {name!r} did not meet the others in "
            f"{patience.total_seconds():g} s (HCCL_CONNECT_TIMEOUT): every one of them must make this call ({error})",
        ) from error
    record.id, _next_id = _next_id, _next_id + 1
    _open[record.id] = comm


recorder: Callable[[Callable[[], None]], None] | None = None
"""While a graph is captured: takes what would be computed now, to compute it at every replay, on the same memory."""


def _run(calls: Any, count: int) -> None:
    if recorder is None:
        _compute(calls[:count])
    else:
        recorder(partial(_compute, [_kept(call) for call in calls[:count]]))


def _kept(call: CollectiveCall) -> CollectiveCall:
    """A copy that outlives the call from C."""
    copy = CollectiveCall.from_buffer_copy(call)
    ranks = call.comm.contents.size
    length = ranks**2 if KINDS[call.kind : call.kind + 1] == (_all_to_all_vc,) else ranks
    for name in ("send_counts", "send_offsets", "receive_counts", "receive_offsets"):
        numbers = getattr(call, name)
        if numbers:
            setattr(copy, name, (c_uint64 * length)(*numbers[:length]))
    return copy


def _compute(calls: Sequence[CollectiveCall]) -> None:
    first = calls[0]
    if first.kind < len(KINDS):
        KINDS[first.kind](_open[first.comm.contents.id], first)
        return
    together: dict[int, list[Message]] = {}
    for call in calls:
        message = Message(call.kind == RECEIVE, call.received(call.count), call.peer)
        together.setdefault(call.comm.contents.id, []).append(message)
    for receives in (False, True):  # all sends are on their way before the first receive waits
        for number, messages in together.items():
            chosen = [message for message in messages if message.receive is receives]
            if chosen:
                _open[number].transfer(chosen)


def _close(handle: Any) -> None:
    _open.pop(handle.contents.id).close()


# ---- the connection to C ----

_Handler = Callable[..., None]
_SIGNATURES: tuple[tuple[str, _Handler, tuple[Any, ...]], ...] = (
    ("root_info", _root_info, (c_void_p,)),
    ("open", _open_comm, (POINTER(Comm), c_void_p)),
    ("run", _run, (POINTER(CollectiveCall), c_uint32)),
    ("close", _close, (POINTER(Comm),)),
)


def _answering(library: ctypes.CDLL, function: _Handler) -> Callable[..., int]:
    """``function`` as C calls it: no exception leaves it, the result is HCCL's code."""

    @wraps(function)
    def answer(*arguments: Any) -> int:
        try:
            with torch.inference_mode():
                function(*arguments)
            return HcclResult.SUCCESS
        except CollectiveError as error:
            failure = error
        except EmulatorError as error:
            failure = CollectiveError(HcclResult.PARA, str(error))
        except BaseException as error:
            failure = CollectiveError(HcclResult.INTERNAL, f"emulated HCCL, {function.__name__}: {error!r}")
        library.emu_set_error(f"{failure}".encode())
        return failure.code

    return answer


_connected: list[Any] = []
"""C calls these as long as the process lives."""


def connect(library: ctypes.CDLL) -> None:
    """Answer HCCL's calls from now on. Once per process."""
    types = [(name, ctypes.CFUNCTYPE(c_int32, *arguments)) for name, _, arguments in _SIGNATURES]
    table = type("Handlers", (ctypes.Structure,), {"_fields_": types})()
    for (name, function, _), (_, kind) in zip(_SIGNATURES, types, strict=True):
        setattr(table, name, kind(_answering(library, function)))
    library.emu_set_error.argtypes = (c_char_p,)
    library.emu_set_error.restype = None
    library.emu_set_hccl_handlers.argtypes = (c_void_p,)
    library.emu_set_hccl_handlers.restype = None
    _connected.append(table)
    library.emu_set_hccl_handlers(ctypes.addressof(table))
    atexit.register(_disconnect, library)
    _learn_timeouts()


def _disconnect(library: ctypes.CDLL) -> None:
    """Before the interpreter ends: torch_npu's threads and destructors must find no Python."""
    library.emu_set_hccl_handlers(None)
    for comm in _open.values():
        comm.close()
    _open.clear()


def _learn_timeouts() -> None:
    """Note the timeout of every HCCL process group that torch_npu makes."""
    from torch_npu._init.registry import distributed as registry

    create = registry._new_process_group_hccl_helper

    def remember(options: Any, pg_options: Any) -> Any:
        timeouts[GROUP_NAME.format(options.group_id)] = options.timeout
        return create(options, pg_options)

    registry._new_process_group_hccl_helper = remember


def communicators() -> Iterator[Communicator]:
    """Those that are open in this process."""
    yield from _open.values()
