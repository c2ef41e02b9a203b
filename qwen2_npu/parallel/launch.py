"""Which of several processes this one is, and the group that they form: one process per card, called a rank.

DeepSpeed's launcher and torchrun start the processes, and tell each one in its environment which rank it is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qwen2_npu.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

TIMEOUT_VARIABLE = "QWEN2_NPU_TIMEOUT"

TIMEOUT = 300.0
"""Seconds that ranks wait for one another: when they start, in each collective, and at the end."""

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""Type of device -> what torch.distributed calls its collectives."""

HCCL_TIMEOUTS = {"HCCL_CONNECT_TIMEOUT": (120, 7200), "HCCL_EXEC_TIMEOUT": (1, 17340)}
"""HCCL's own waits, in seconds, and their limits. The second one also ends collectives inside of graphs."""

LINGER = 5.0
"""Seconds for which a rank that has nothing to say leaves it to the launcher to end it: the message comes first."""

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
ALSO_REQUIRED = ("MASTER_ADDR", "MASTER_PORT")
"""These alone are set in the shells of many clusters and mean nothing."""

WAY_OUT = (
    "start with `deepspeed --num_gpus N --module qwen2_npu …` or `torchrun --nproc_per_node N -m qwen2_npu …`, "
    f"or unset {', '.join(REQUIRED)}"
)


class RankError(ValueError):
    """What one rank, or the launcher, did to the others: the message names it."""


class PeerFailed(SystemExit):
    """Another rank failed, which has its own message. Not caught, it ends this process without a word, status 1.

    Attributes:
        reason: what the other rank said.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(1)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Launch:
    """What a launcher says in the environment of a rank.

    Attributes:
        rank, world_size: of all ranks, on all nodes.
        local_rank, local_size: of those on this node. The size is None where the launcher does not say it.
        address, port: where the ranks meet.
        agent_store: torchrun itself listens there; else rank 0 does.
        attempt: torchrun's count of restarts.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int | None = None
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    attempt: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch | None:
        """From ``environment``; None where no launcher has started this process.

        Raises:
            UnsupportedError: a part is missing or makes no sense.
        """
        if not any(environment.get(name) for name in REQUIRED):
            return None
        world_size = _number(environment, "WORLD_SIZE", 1)
        rank = _number(environment, "RANK", 0, world_size - 1)
        local_rank = _number(environment, "LOCAL_RANK", 0, world_size - 1)
        local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), None)
        given: dict[str, Any] = {}
        if local_size is not None:
            given["local_size"] = _number(environment, local_size, local_rank + 1)
        if world_size > 1:
            given["port"] = _number(environment, "MASTER_PORT", 1, 65535)
            if not environment.get("MASTER_ADDR"):
                raise UnsupportedError(f"MASTER_ADDR is not set, and WORLD_SIZE is {world_size}: {WAY_OUT}")
            given["address"] = environment["MASTER_ADDR"]
            given["agent_store"] = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            if environment.get("TORCHELASTIC_RESTART_COUNT"):
                given["attempt"] = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
        return cls(rank, local_rank, world_size, **given)


def _number(environment: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    text = environment.get(name) or ""
    if not text:
        given = ", ".join(f"{each}={environment[each]}" for each in REQUIRED if environment.get(each))
        raise UnsupportedError(f"{name} is not set, and {given}: {WAY_OUT}")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UnsupportedError(f"{name}={text!r} must be an integer {limits}: {WAY_OUT}")
    return number


def launched() -> Launch | None:
    """What the launcher says that started this process; None where none did.

    Raises:
        UnsupportedError: a part is missing or makes no sense.
    """
    return Launch.of(os.environ)


def timeout() -> float:
    """Seconds that ranks wait for one another.

    Raises:
        UnsupportedError: the variable holds something else.
    """
    text = os.environ.get(TIMEOUT_VARIABLE) or str(TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86400:
        raise UnsupportedError(f"{TIMEOUT_VARIABLE}={text!r} must be a number of seconds from 1 to 86400")
    return seconds


@dataclass(frozen=True)
class RankGroup:
    """The ranks that compute together, as one of them sees it.

    Attributes:
        device: this rank's own.
        store: what all ranks read and write (torch's TCPStore); None where this process is the only one.
    """

    rank: int
    world_size: int
    device: torch.device
    store: Any = None


_current: RankGroup | None = None


def current() -> RankGroup | None:
    """The group of the innermost :func:`joined` around the caller, or torch.distributed's own; None where none is."""
    if _current is not None:
        return _current
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    import torch

    store = dist.distributed_c10d._get_default_store()
    return RankGroup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), store)


def set_hccl_timeouts(seconds: float) -> None:
    """HCCL's own, where the user has not set them, for a process group with a timeout of ``seconds``."""
    for name, (low, high) in HCCL_TIMEOUTS.items():
        # A second less than the group's: torch_npu warns otherwise.
        os.environ.setdefault(name, str(round(min(max(seconds - 1, low), high))))


@contextlib.contextmanager
def joined(device: str | None = None, *, given_as: str = "") -> Iterator[RankGroup]:
    """Be one rank of the group that the launcher started, on a card of its own.

    Where nothing has launched this process, the group is this process, on ``device``. Inside the block
    torch.distributed is initialised if there are several ranks. A process group that is already there is used as it
    is, and left as it is. If a rank fails in the block, is killed, or lets the others wait too long, all of them end,
    and one of them says why.

    Args:
        device: npu, cuda or cpu, the rank's own number is added.  Default: npu where there is one, else cpu.
        given_as: what the user wrote, for messages.

    Raises:
        UnsupportedError: the launcher's variables make no sense, or there are more ranks than cards. Before the ranks
            wait for one another.
        RankError: a rank did not come, is gone, or did not answer in time.
        PeerFailed: another rank failed, and says so itself.
    """
    global _current
    if _current is not None:
        yield _current
        return
    launch, seconds = launched(), timeout()
    if launch is None or launch.world_size == 1:
        with _as_current(RankGroup(0, 1, own_device(launch, device, given_as=given_as))) as group:
            yield group
        return
    import torch.distributed as dist

    if dist.is_initialized():
        own = own_device(launch, device, given_as=given_as)
        store = dist.distributed_c10d._get_default_store()
        with _as_current(RankGroup(dist.get_rank(), dist.get_world_size(), own, store)) as group:
            yield group
        return
    from qwen2_npu.parallel.agreement import agree, versions
    from qwen2_npu.parallel.board import Board
    from qwen2_npu.parallel.monitor import Monitor

    set_hccl_timeouts(seconds)
    try:
        own = own_device(launch, device, given_as=given_as)
        board = Board.open(launch, seconds)
    except Exception as error:
        record_failure(error)
        raise
    with Monitor(launch, board, seconds) as monitor:
        monitor.wait_for_all()
        facts = RankGroup(launch.rank, launch.world_size, own, board.part("facts"))
        agree(versions(), way_out="install the same on all nodes", group=facts)
        dist.init_process_group(
            BACKENDS[own.type],
            store=board.part("group"),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=seconds),
        )
        end: SystemExit | None = None
        try:
            with _as_current(facts) as group:
                yield group
        except SystemExit as error:
            if error.code:
                raise
            end = error  # in good order
        monitor.work_is_done()
        dist.destroy_process_group()
        monitor.leave()
    if end is not None:
        raise end


@contextlib.contextmanager
def _as_current(group: RankGroup) -> Iterator[RankGroup]:
    global _current
    _current = group
    try:
        yield group
    finally:
        _current = None


def own_device(launch: Launch | None, device: str | None, *, given_as: str = "") -> torch.device:
    """The device of this rank, which becomes torch's current one.

    Args:
        launch: from :func:`launched`.
        device: as in :func:`joined`.
        given_as: what the user wrote, for messages.

    Raises:
        UnsupportedError: it is not here, it is one card for several ranks, or there are fewer cards than ranks.
    """
    import torch

    from qwen2_npu.devices import usable

    kind, colon, number = (device or _default_kind()).partition(":")
    given_as = given_as or f"device={device!r}"
    if launch is None or launch.world_size == 1 or kind == "cpu":
        return usable(f"{kind}{colon}{number}", given_as=given_as)
    if kind not in BACKENDS:
        raise UnsupportedError(f"{given_as}: several ranks run on {', '.join(BACKENDS)}")
    if colon:
        raise UnsupportedError(
            f"{given_as} is one card for {launch.world_size} ranks: leave the number out, rank {launch.rank} takes "
            f"{kind}:{launch.local_rank}"
        )
    if kind == "npu" and importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")
    module: Any = getattr(torch, kind, None)
    count = int(module.device_count()) if module is not None else 0
    if launch.local_rank < count or not count:  # without any, usable says why
        own = usable(f"{kind}:{launch.local_rank}", given_as=given_as)
        module.set_device(launch.local_rank)
        return own
    if launch.local_rank > count:
        time.sleep(LINGER)  # rank number `count` says it
        raise PeerFailed(f"there are {count} cards")
    cards = f"there are {count} cards" if count > 1 else "there is 1 card"
    raise UnsupportedError(
        f"rank {launch.rank} needs {kind}:{launch.local_rank}, and {cards}: start at most {count} per node "
        f"(deepspeed --num_gpus {count}, torchrun --nproc_per_node {count})"
    )


def _default_kind() -> str:
    """npu where torch_npu finds one, real or emulated, else cpu."""
    import torch

    if importlib.util.find_spec("torch_npu") is None:
        return "cpu"
    importlib.import_module("torch_npu")
    return "npu" if torch.npu.is_available() else "cpu"  # type: ignore[attr-defined]


def record_failure(error: BaseException) -> None:
    """Leave ``error`` where torchrun looks for the first one of a job, which it shows."""
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def fails() -> None:
        raise error

    if not isinstance(error, SystemExit | KeyboardInterrupt):
        with contextlib.suppress(type(error)):
            fails()
