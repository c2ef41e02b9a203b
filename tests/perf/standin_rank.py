"""Ranks of a launch that measure nothing: ``python tests/perf/standin_rank.py BEHAVIOUR … FOLDER AGENT_PID``.

Their latencies are told, and every measurement says that it is a self-test. All but two do without torch, which takes
most of a rank's time to start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.perf import worker
from qwen2_npu.conformance.perf.job import MEASURING, RESULT, Job, Ticket
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.worker import Rank

PREFILL_MS, DECODE_MS = 100.0, 10.0


def worker_of(behaviour: str, *more: str) -> tuple[str, ...]:
    """The launcher's argument for ranks that behave so."""
    return (__file__, behaviour, *more)


def told(job: Job, rank: Rank, prefill_ms: float = PREFILL_MS, decode_ms: float = DECODE_MS) -> Measurement:
    """Flawless, and slower by 1 ms on every rank after the first in turn: step s is slowest on rank s modulo ranks."""
    rank.at(MEASURING)
    steps = [prefill_ms] + [decode_ms] * job.decode_steps
    shown = tuple(ms + (step % rank.count == rank.number) for step, ms in enumerate(steps))
    return Measurement(
        prefill_ms=shown[0],
        decode_ms=shown[1:],
        wall_ms=(),
        contexts=(0, *range(job.input_tokens, job.input_tokens + job.decode_steps)),
        input_tokens=job.input_tokens,
        asked_steps=job.decode_steps,
        weights=job.weights,
        self_test=True,
    )


def told_latencies(job: Job, rank: Rank) -> Measurement:
    """The JSON behind the behaviour: prefill and decode, factors by rank, and whether peak memory is said."""
    settings = json.loads(sys.argv[2])
    factor = settings.get("factors", {}).get(str(rank.number), 1.0)
    plain = told(job, rank)
    return replace(
        plain,
        prefill_ms=settings["prefill"] * factor,
        decode_ms=(settings["decode"] * factor,) * job.decode_steps,
        peak_bytes=settings.get("peak_bytes"),
    )


class ToldClock:
    """A timer that shows its rank's number."""

    def __init__(self, shown: float) -> None:
        self.shown, self.steps = shown, 0

    def start(self) -> None:
        self.steps += 1

    def stop(self) -> None:
        pass

    def steps_ms(self) -> list[float]:
        return [self.shown] * self.steps

    def wall_ms(self) -> list[float]:
        return []


def meets(job: Job, rank: Rank) -> Measurement:
    """Joins the others for real, and times steps whose content is a sum over all ranks."""
    device = rank.join(job.device)
    import torch
    import torch.distributed as dist

    rank.at(MEASURING)
    if rank.number == 1:
        time.sleep(0.2)  # rank 0 must wait for it, before its first step alone
    timer = rank.together(job.device, lambda kind: ToldClock(rank.number + 1.0))
    ready, begun, total = time.monotonic(), [], 0.0
    for _ in range(job.decode_steps + 1):
        timer.start()
        begun.append(time.monotonic())
        ones = torch.full((3,), rank.number + 1.0, device=device)
        dist.all_reduce(ones)
        total += float(ones.sum())
        timer.stop()
    assert total == 3 * sum(range(1, rank.count + 1)) * (job.decode_steps + 1), total
    last, first = torch.tensor(ready, dtype=torch.float64), torch.tensor(begun[0], dtype=torch.float64)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    assert first >= last, f"a rank began {float(last - first)} s before the last one was ready"
    samples = timer.steps_ms()
    return replace(told(job, rank), prefill_ms=samples[0], decode_ms=tuple(samples[1:]))


def small_model(job: Job, device: str) -> Any:
    """The tiny checkpoint, whole on every rank, with a sum over the ranks behind every call of the model."""
    import torch
    import torch.distributed as dist

    from qwen2_npu.conformance import tiny
    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32, device=device)

    def mean(module: Any, arguments: Any, output: Any) -> Any:
        before = output.logits.clone()
        dist.all_reduce(output.logits)
        output.logits /= dist.get_world_size()
        assert torch.allclose(output.logits, before, atol=1e-3), "ranks computed something else"
        return output

    model.register_forward_hook(mean)
    return model


def measures(job: Job, rank: Rank) -> Measurement:
    """The worker's own way to measure, on a model that is not split."""
    return replace(worker.measure(job, rank, small_model), self_test=True)


# ---- what goes wrong ------------------------------------------------------------------------------------------------
def _rank_1(act: Callable[[], Any]) -> Callable[[Job, Rank], Measurement]:
    def measure(job: Job, rank: Rank) -> Measurement:
        measurement = told(job, rank)
        print(f"rank {rank.number} is about to act")
        if rank.number == 1:
            act()
        return measurement

    return measure


def _raise() -> None:
    raise RuntimeError("the card is on fire")


def _start_a_child() -> None:
    """In a session of its own, as libraries that compile have theirs; its folder says whose it is."""
    subprocess.Popen(["sleep", "600"], cwd=sys.argv[-2], start_new_session=True)


def _lose_a_child() -> None:
    _start_a_child()
    os.kill(os.getpid(), signal.SIGKILL)


def _hang_with_a_child() -> None:
    _start_a_child()
    time.sleep(600)


def too_few_steps(job: Job, rank: Rank) -> Measurement:
    measurement = told(job, rank)
    return replace(measurement, decode_ms=measurement.decode_ms[:-1]) if rank.number == 1 else measurement


def _no_result(job: Job, rank: Rank) -> Measurement:
    raise SystemExit(0)


def _instead(write: Callable[[Path, Ticket, int, Measurement], None]) -> Callable[[Job, Rank], Measurement]:
    """Rank 0 writes something in place of the result."""

    def measure(job: Job, rank: Rank) -> Measurement:
        if rank.number == 0:
            write(rank.folder, Ticket.read(rank.folder), rank.count, told(job, rank))
        raise SystemExit(0)

    return measure


def truncated(folder: Path, ticket: Ticket, ranks: int, measurement: Measurement) -> None:
    ticket.write_result(folder, ranks, measurement)
    path = folder / RESULT
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")


def old(folder: Path, ticket: Ticket, ranks: int, measurement: Measurement) -> None:
    Ticket("0123456789abcdef", ticket.job).write_result(folder, ranks, measurement)


def of_another_batch(folder: Path, ticket: Ticket, ranks: int, measurement: Measurement) -> None:
    what = replace(ticket.job.configuration, batch=ticket.job.configuration.batch * 2)
    Ticket(ticket.run, replace(ticket.job, configuration=what)).write_result(folder, ranks, measurement)


def of_more_ranks(folder: Path, ticket: Ticket, ranks: int, measurement: Measurement) -> None:
    ticket.write_result(folder, ranks + 1, measurement)


BEHAVIOURS: dict[str, Callable[[Job, Rank], Measurement]] = {
    "told": told,
    "told_latencies": told_latencies,
    "meets": meets,
    "measures": measures,
    "is_killed": _rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "raises": _rank_1(_raise),
    "exits": _rank_1(lambda: os._exit(3)),
    "hangs": _rank_1(lambda: time.sleep(600)),
    "loses_a_child": _rank_1(_lose_a_child),
    "hangs_with_a_child": _rank_1(_hang_with_a_child),
    "too_few_steps": too_few_steps,
    "no_result": _no_result,
    "truncated": _instead(truncated),
    "old": _instead(old),
    "of_another_batch": _instead(of_another_batch),
    "of_more_ranks": _instead(of_more_ranks),
}


if __name__ == "__main__":
    worker.serve(BEHAVIOURS[sys.argv[1]], *sys.argv[-2:])
