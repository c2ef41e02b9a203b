"""One HCCL communicator: ranks of this host, over gloo, on CPU tensors.

Every method blocks until its result is there. Tensors are one-dimensional and contiguous. What only moves travels as
bytes, so that every dtype can; ``reduction`` says which can be reduced.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d

from qwen2_npu.emulator.collectives import faults, reduction
from qwen2_npu.emulator.collectives.errors import CollectiveError, HcclResult

Tensor = torch.Tensor

LOOPBACK = "127.0.0.1"

SENDS_ON_THE_WAY = 64
"""How many messages of a rank may wait for their receivers; one more waits for the oldest."""


@dataclass(frozen=True)
class Message:
    """One send (``receive`` false) or receive between this rank and ``peer``; they match in tag and order."""

    receive: bool
    tensor: Tensor
    peer: int
    tag: int = 0


class Communicator:
    """What ``HcclComm`` stands for on one rank.

    Args:
        name: as ``get_hccl_comm_name`` gives it: the same on all ranks.
        rank, size: of this process in the communicator.
        store: where the ranks find one another, in ``patience``.
        timeout: gives the time to wait for the other ranks; asked at every call.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        store: dist.Store,
        patience: timedelta,
        timeout: Callable[[], timedelta],
    ) -> None:
        self.name, self.rank, self.size = name, rank, size
        self._timeout = timeout
        self._broken = ""
        self._sent: deque[tuple[Any, Tensor]] = deque()
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = patience
        self._gloo = gloo(store, rank, size, options)

    # ---- collectives ----

    def all_reduce(self, x: Tensor, operation: str = "sum", collective: str = "all_reduce") -> Tensor:
        """All ranks' ``x`` reduced, in its dtype: a new tensor, the same on every rank."""
        reduction.check(x.dtype, operation)
        with self._call(collective) as dropped:
            mine = reduction.identity(x, operation) if dropped else x
            partial = mine.to(reduction.COMPUTED_IN[x.dtype], copy=True)
            if partial.numel():
                options = self._options(c10d.AllreduceOptions)
                options.reduceOp = reduction.OPERATIONS[operation]
                self._gloo.allreduce([partial], options).wait()
            return partial.to(x.dtype)

    def reduce_scatter(self, x: Tensor, operation: str = "sum", counts: Sequence[int] | None = None) -> Tensor:
        """This rank's part of all ranks' ``x`` reduced.

        Args:
            counts: elements for each rank; None: equal parts.
        """
        counts = self._equal(x) if counts is None else counts
        return torch.split(self.all_reduce(x, operation, "reduce_scatter"), list(counts))[self.rank]

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """``root``'s ``x``: a new tensor."""
        with self._call("broadcast") as dropped:
            result = torch.zeros_like(x) if dropped else x.clone()
            if result.numel():
                options = self._options(c10d.BroadcastOptions)
                options.rootRank, options.rootTensor = root, 0
                self._gloo.broadcast([_bytes(result)], options).wait()
            return result

    def all_gather(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """All ranks' tensors, one after another.

        Args:
            counts: how many elements each rank gives; None: as many as this one.
        """
        if counts is None:
            counts = [x.numel()] * self.size
        return self.all_to_all(x.repeat(self.size), [x.numel()] * self.size, counts, "all_gather")

    def scatter(self, x: Tensor, count: int, root: int) -> Tensor:
        """This rank's ``count`` elements of ``root``'s ``x``; on other ranks only the dtype of ``x`` matters."""
        mine = self.rank == root
        sent = [count if mine else 0] * self.size
        received = [count if rank == root else 0 for rank in range(self.size)]
        return self.all_to_all(x if mine else x[:0], sent, received, "scatter")

    def all_to_all(
        self,
        x: Tensor,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
        collective: str = "all_to_all",
    ) -> Tensor:
        """What every rank has for this one, in their order.

        Args:
            sent: how many elements of ``x`` go to each rank; None: equal parts.
            received: how many elements come from each; None: as many as are sent.
        """
        sent = self._equal(x) if sent is None else sent
        received = sent if received is None else received
        with self._call(collective) as dropped:
            result = x.new_empty(sum(received))
            size = x.element_size()
            self._gloo.alltoall_base(
                _bytes(result),
                _bytes(torch.zeros_like(x) if dropped else x),
                [size * count for count in received],
                [size * count for count in sent],
                self._options(c10d.AllToAllOptions),
            ).wait()
            return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self._call("barrier"):
            self._gloo.barrier(self._options(c10d.BarrierOptions)).wait()

    # ---- point to point ----

    def transfer(self, messages: Sequence[Message]) -> None:
        """Sends and receives that go together, in any order; those between two ranks match in their order.

        Receives are done on return. A send keeps a copy and does not wait for its receiver.
        """
        with self._call("receive" if any(message.receive for message in messages) else "send") as dropped:
            for message in messages:
                if not message.receive:
                    copy = torch.zeros_like(message.tensor) if dropped else message.tensor.clone()
                    self._sent.append((self._gloo.send([_bytes(copy)], message.peer, message.tag), copy))
            arriving = [self._gloo.recv([_bytes(m.tensor)], m.peer, m.tag) for m in messages if m.receive]
            for work in arriving:
                work.wait(self._timeout())
            while len(self._sent) > SENDS_ON_THE_WAY:
                self._sent.popleft()[0].wait(self._timeout())

    def close(self) -> None:
        """Wait until what was sent has arrived, and leave the group."""
        while self._sent:
            try:
                self._sent.popleft()[0].wait(self._timeout())
            except RuntimeError:  # nobody receives it any more
                self._sent.clear()
        self._gloo.shutdown()

    # ---- common ----

    @contextmanager
    def _call(self, collective: str) -> Iterator[bool]:
        """Around one call: injected faults (true: contribute nothing), and errors that say who waited for whom."""
        where = f"{collective} on rank {global_rank()} in group {self.name!r} ({self.rank} of {self.size})"
        if self._broken:
            raise CollectiveError(
                HcclResult.UNAVAIL, f"{where}: the communicator is unusable since then: {self._broken}"
            )
        fault = faults.at(collective, global_rank())
        begin = time.monotonic()
        try:
            if fault == "fail":
                raise CollectiveError(HcclResult.REMOTE, f"{where} failed by injection")
            if fault == "hang":
                time.sleep(self._timeout().total_seconds())
                raise CollectiveError(HcclResult.TIMEOUT, f"{where} was hung by injection until the group's timeout")
            yield fault == "drop"
        except CollectiveError as error:
            self._broken = str(error)
            raise
        except RuntimeError as error:
            failure = self._explain(where, error, time.monotonic() - begin)
            self._broken = str(failure)
            raise failure from error

    def _explain(self, where: str, error: RuntimeError, seconds: float) -> CollectiveError:
        text = str(error)
        if "imed out" in text:
            return CollectiveError(
                HcclResult.TIMEOUT,
                f"{where}: no answer from the other ranks in {seconds:.1f} s; the group's timeout is "
                f"{self._timeout().total_seconds():g} s. Look at the other ranks' output: one failed, "
                "ended, or called another collective",
            )
        return CollectiveError(HcclResult.REMOTE, f"{where}: another rank is gone or disagrees on the sizes ({text})")

    def _options(self, kind: type) -> Any:
        options = kind()
        options.timeout = self._timeout()
        return options

    def _equal(self, x: Tensor) -> list[int]:
        if x.numel() % self.size:
            raise CollectiveError(HcclResult.PARA, f"{x.numel()} elements cannot be divided among {self.size} ranks")
        return [x.numel() // self.size] * self.size


def global_rank() -> int:
    """This process's rank in the default group."""
    return dist.get_rank() if dist.is_initialized() else 0


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
