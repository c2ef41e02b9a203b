"""One rank of a launched row: ``python -m qwen2_npu.conformance.perf.worker FOLDER AGENT_PID``, started by ``agent``.

Another module that calls :func:`serve` with its own way to measure is a worker, too; the self-tests have one.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.perf import processes, tensor_parallel
from qwen2_npu.conformance.perf.job import (
    BUILDING,
    DONE,
    HANDING_IN,
    MEASURING,
    MEETING,
    STARTING,
    Job,
    Status,
    Ticket,
    measured_file,
)
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.slowest import slowest
from qwen2_npu.conformance.perf.timers import StepTimer, timer_for
from qwen2_npu.conformance.report import write_text

BACKENDS = {"cpu": "gloo", "npu": "hccl", "cuda": "nccl"}
"""Type of device -> torch.distributed's backend."""

GROUP_TIMEOUT = timedelta(days=1)
"""The launcher's limit comes first: it knows which rank the others wait for."""

POLL_SECONDS = 0.02

STACK_SIGNAL = signal.SIGUSR1
"""Asks a rank that hangs where it is: it writes the stack of every thread to its log."""


class Rank:
    """This process among the ranks of a launch."""

    def __init__(self, folder: Path, number: int, count: int) -> None:
        self.folder, self.number, self.count = folder, number, count
        self.stage = STARTING

    def at(self, stage: str, error: str | None = None) -> None:
        """Say where this rank is."""
        self.stage = stage
        Status(self.number, os.getpid(), stage, error, time.time()).write(self.folder)

    def join(self, kind: str) -> str:
        """Meet the other ranks.

        Args:
            kind: type of device.

        Returns:
            This rank's device.
        """
        import torch
        import torch.distributed as dist

        if kind == "npu":
            importlib.import_module("torch_npu")
        self.at(MEETING)
        device = kind
        if kind != "cpu":
            device = f"{kind}:{self.number}"  # before the process group, which opens the card it finds selected
            getattr(torch, kind).set_device(self.number)
        dist.init_process_group(BACKENDS[kind], timeout=GROUP_TIMEOUT)
        return device

    def together(self, kind: str, timer_for: Callable[[str], StepTimer] = timer_for) -> StepTimer:
        """A timer for ``kind`` of device whose first step begins on all ranks together."""
        import torch.distributed as dist

        return Together(timer_for(kind), dist.barrier)

    def hand_in(self, ticket: Ticket, measurement: Measurement) -> None:
        """Give what this rank measured to rank 0; rank 0 waits for all and writes the result.

        Raises:
            ValueError: these are no latencies of the protocol, or ranks did not do the same.
        """
        self.at(HANDING_IN)
        faults = measurement.faults()
        if faults:
            raise ValueError("; ".join(faults))
        write_text(measured_file(self.folder, self.number), json.dumps(measurement.to_json()))
        if self.number == 0:
            files = [measured_file(self.folder, rank) for rank in range(self.count)]
            while not all(file.exists() for file in files):  # the agent ends this rank if another fails
                time.sleep(POLL_SECONDS)
            found = [Measurement.from_json(json.loads(file.read_text(encoding="utf-8"))) for file in files]
            ticket.write_result(self.folder, self.count, slowest(found))


class Together:
    """``timer``, whose first start waits for the other ranks. Later ones do not: see ``slowest``."""

    def __init__(self, timer: StepTimer, barrier: Callable[[], Any]) -> None:
        self._timer = timer
        self._barrier: Callable[[], Any] | None = barrier

    def start(self) -> None:
        if self._barrier is not None:
            self._barrier()
            self._barrier = None
        self._timer.start()  # waits for the device, and so for a barrier that runs there

    def stop(self) -> None:
        self._timer.stop()

    def steps_ms(self) -> list[float]:
        return self._timer.steps_ms()

    def wall_ms(self) -> list[float]:
        return self._timer.wall_ms()


def measure(job: Job, rank: Rank, build: Callable[[Job, str], Any] = tensor_parallel.build) -> Measurement:
    """What this rank measures by the guide's protocol.

    Args:
        build: this rank's part of the model, on a device.
    """
    device = rank.join(job.device)
    import torch

    from qwen2_npu.conformance.perf import protocol

    rank.at(BUILDING)
    torch.manual_seed(job.seed)
    model = build(job, device)
    rank.at(MEASURING)
    return protocol.measure(
        model,
        batch=job.configuration.batch,
        input_tokens=job.input_tokens,
        decode_steps=job.decode_steps,
        weights=job.weights,
        timer_for=rank.together,
    )


def serve(measure: Callable[[Job, Rank], Measurement], folder: str, agent: str) -> None:
    """Do the folder's job as the rank that the environment says, and leave a word of whatever goes wrong.

    Raises:
        ValueError: there are not as many ranks as the job has cards.
    """
    processes.die_with_parent(signal.SIGKILL, int(agent))
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    os.dup2(2, 1)  # one log, in order
    rank = Rank(Path(folder), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    rank.at(STARTING)
    try:
        ticket = Ticket.read(rank.folder)
        if ticket.job.configuration.cards != rank.count:
            raise ValueError(f"{rank.count} ranks were started for {ticket.job.configuration}")
        rank.hand_in(ticket, measure(ticket.job, rank))
        _leave_group()
    except Exception as error:
        rank.at(rank.stage, f"{type(error).__name__}: {error}")
        raise
    rank.at(DONE)


def _leave_group() -> None:
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    serve(measure, *sys.argv[1:])
