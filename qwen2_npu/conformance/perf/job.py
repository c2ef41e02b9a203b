"""What the launcher, its agent and its ranks tell one another: small files in one folder, each whole or absent.

``ticket.json`` (launcher → ranks) is the job; ``status-R.json`` (rank R → launcher) where it is; ``measured-R.json``
(rank R → rank 0) what it measured; ``result.json`` (rank 0 → launcher) the measurement of all; ``failures.json``
(agent → launcher) how ranks ended. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.report import write_text

TICKET, RESULT, FAILURES, LOGS, AGENT_LOG = "ticket.json", "result.json", "failures.json", "logs", "agent.log"

STARTING, MEETING, BUILDING, MEASURING, HANDING_IN, DONE = STAGES = (
    "starting",
    "meeting the other ranks",
    "building the model",
    "measuring",
    "handing in",
    "done",
)
"""In this order; the rank that is furthest behind is the one that the others wait for."""


@dataclass(frozen=True)
class Job:
    """One generate call on ``configuration.cards`` cards.

    Attributes:
        device: type of a torch device; rank R takes its card R.
        input_tokens: of the prompt, per row.
        decode_steps: after the first step, so that one more token comes out.
        model_path: a checkpoint folder; None for random weights.
        seed: of random weights, the same on every rank.
    """

    configuration: Configuration
    device: str
    input_tokens: int
    decode_steps: int
    model_path: str | None = None
    seed: int = 0

    @property
    def weights(self) -> str:
        """As :class:`Measurement` names them."""
        return "random" if self.model_path is None else Path(self.model_path).name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "configuration": Configuration(**values["configuration"])})

    def differences(self, other: dict[str, Any]) -> list[str]:
        """``name: ours asked, theirs`` for everything in which the plain values of another job differ."""
        ours, theirs = _flat(self.to_json()), _flat(other)
        names = dict.fromkeys((*ours, *theirs))
        return [
            f"{name}: {ours.get(name)} asked, {theirs.get(name)} measured"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class Ticket:
    """A job with the number of its launch, which every result must carry."""

    run: str
    job: Job

    def write(self, folder: Path) -> None:
        write_text(folder / TICKET, json.dumps({"run": self.run, "job": self.job.to_json()}))

    @classmethod
    def read(cls, folder: Path) -> Ticket:
        values = json.loads((folder / TICKET).read_text(encoding="utf-8"))
        return cls(values["run"], Job.from_json(values["job"]))

    def write_result(self, folder: Path, ranks: int, measurement: Measurement) -> None:
        """What rank 0 hands back."""
        content = {"run": self.run, "job": self.job.to_json(), "ranks": ranks, "measurement": measurement.to_json()}
        write_text(folder / RESULT, json.dumps(content))


@dataclass(frozen=True)
class Status:
    """Where a rank is.

    Attributes:
        error: what it fails with, None while it does not.
        seconds: the clock (time.time) when it said so.
    """

    rank: int
    pid: int
    stage: str
    error: str | None
    seconds: float

    def write(self, folder: Path) -> None:
        write_text(folder / f"status-{self.rank}.json", json.dumps(asdict(self)))

    @property
    def order(self) -> int:
        return STAGES.index(self.stage)


def statuses(folder: Path) -> dict[int, Status]:
    """Rank -> where it is, of the ranks that have started."""
    found = [Status(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("status-*.json")]
    return {status.rank: status for status in sorted(found, key=lambda status: status.rank)}


def measured_file(folder: Path, rank: int) -> Path:
    return folder / f"measured-{rank}.json"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    inner = values.get("configuration")
    return {**(inner if isinstance(inner, dict) else {}), **{k: v for k, v in values.items() if k != "configuration"}}
