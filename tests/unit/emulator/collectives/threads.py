"""Three ranks in one process: a thread each, with a communicator of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from torch import distributed as dist

from qwen2_npu.emulator.collectives.communicator import Communicator

Result = TypeVar("Result")

SIZE = 3
PATIENCE = timedelta(seconds=20)


@contextmanager
def communicators(name: str, timeout: timedelta = PATIENCE) -> Iterator[list[Communicator]]:
    """One per rank."""
    store = dist.HashStore()
    made = on_all(lambda rank: Communicator(name, rank, SIZE, store, PATIENCE, lambda: timeout))
    yield made
    for communicator in made:
        communicator.close()


def on_all(function: Callable[[int], Result]) -> list[Result]:
    """What ``function`` returns on each rank."""
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(function, range(SIZE)))
