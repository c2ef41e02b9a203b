"""What the ranks of a job tell one another, in torch's TCPStore: no collective is needed, and no pickle."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any, Self

import psutil

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.launch import TIMEOUT_VARIABLE, Launch, RankError

POLL = 0.02
"""Seconds between two looks for a key."""


class Board:
    """One rank's connection. Every method but the constructor's raises RuntimeError where the store is gone.

    Args:
        launch: the rank.
        root: torch's TCPStore.
        timeout: seconds that ranks wait for one another.
    """

    def __init__(self, launch: Launch, root: Any, timeout: float) -> None:
        self._launch, self._root, self._timeout = launch, root, timeout
        self._store = self.part("ranks")

    @classmethod
    def open(cls, launch: Launch, timeout: float) -> Self:
        """Where the ranks of ``launch`` meet. Rank 0 keeps the store, or torchrun does.

        Raises:
            UnsupportedError: the port is taken, or cannot be used.
            RankError: rank 0 did not come.
        """
        import torch.distributed as dist

        place, keeps = f"{launch.address}:{launch.port}", launch.rank == 0 and not launch.agent_store
        try:
            root = dist.TCPStore(
                launch.address,
                launch.port,
                launch.world_size,
                is_master=keeps,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            if not keeps:
                raise RankError(
                    f"rank 0 did not come to {place} within {timeout:g} s ({TIMEOUT_VARIABLE}): see what it says, and "
                    "that this node reaches that address"
                ) from error
            reason = "is in use" if "EADDRINUSE" in str(error) else f"cannot be used ({str(error).splitlines()[0]})"
            raise UnsupportedError(f"MASTER_PORT: {place} {reason}; take another port (--master_port N)") from error
        return cls(launch, root, timeout)

    def clone(self) -> Board:
        """A connection of its own, for another thread: a call that waits keeps other calls waiting."""
        return Board(self._launch, self._root.clone(), self._timeout)

    def part(self, purpose: str) -> Any:
        """A part of the store with keys of its own, as torch.distributed takes it."""
        import torch.distributed as dist

        return dist.PrefixStore(f"qwen2_npu/{self._launch.attempt}/{purpose}", self._root)

    def come(self) -> None:
        """Say that this rank is here.

        Raises:
            UnsupportedError: another rank with this number is here, so the port is another job's.
        """
        rank = self._launch.rank
        if self._store.add(f"count/{rank}", 1) > 1:
            raise UnsupportedError(
                f"MASTER_PORT: another job meets at {self._launch.address}:{self._launch.port}; take another port "
                "(--master_port N)"
            )
        self._store.set(f"here/{rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))

    def tell(self, what: str) -> None:
        """Say ``what`` of this rank."""
        self._store.set(f"{what}/{self._launch.rank}", "")

    def told(self, what: str, rank: int) -> bool:
        """Whether ``rank`` has said ``what``."""
        return bool(self._store.check([f"{what}/{rank}"]))

    def wait(self, what: str, ranks: list[int]) -> list[int]:
        """Until all ``ranks`` have said ``what``.

        Returns:
            Those that have not, in time.
        """
        until = time.monotonic() + self._timeout
        while (ranks := [rank for rank in ranks if not self.told(what, rank)]) and time.monotonic() < until:
            time.sleep(POLL)
        return ranks

    def processes(self, ranks: list[int]) -> dict[int, psutil.Process | None]:
        """Those of ``ranks`` that are on this node, as processes; None for one that is gone already."""
        found: dict[int, psutil.Process | None] = {}
        for rank in ranks:
            said = json.loads(self._store.get(f"here/{rank}"))
            if said["host"] == socket.gethostname():
                try:
                    found[rank] = psutil.Process(int(said["pid"]))
                except psutil.NoSuchProcess:
                    found[rank] = None
        return found

    def beat(self) -> None:
        """Give a sign of life."""
        self._store.add(f"beat/{self._launch.rank}", 1)

    def beats(self, rank: int) -> int:
        """Signs of life that ``rank`` has given."""
        return int(self._store.add(f"beat/{rank}", 0))

    def fail(self, reason: str) -> bool:
        """Leave a reason, if no rank has failed before.

        Returns:
            Whether it is this one.
        """
        mine = json.dumps({"rank": self._launch.rank, "reason": reason})
        return bool(self._store.compare_set("failed", "", mine).decode() == mine)

    def failure(self) -> str:
        """Which rank failed first, and why; empty where none has."""
        if not self._store.check(["failed"]):
            return ""
        said = json.loads(self._store.get("failed"))
        return f"rank {said['rank']} failed: {said['reason']}"
