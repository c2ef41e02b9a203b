"""A stand-in for a machine with eight cards, whose rows really are launched on eight ranks: told latencies.

As a plugin (``-p tests.perf.launched``) it takes the laboratory's place, and says that it is a self-test. The
environment variable LAUNCHED holds, as JSON: ``rank`` (behaviour of tests/perf/standin_rank.py; default: told
latencies, the documented ones), ``factors`` (rank -> factor of its latencies), ``count`` (a file that gets a line per
launch) and ``live`` (true: what the real laboratory can measure is what can be measured).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.perf.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.job import Job
from qwen2_npu.conformance.perf.laboratory import DeviceLaboratory, Request
from qwen2_npu.conformance.perf.launcher import launch
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.memory import memory_of
from qwen2_npu.conformance.perf.rows import PHASES, Configuration
from qwen2_npu.conformance.sizes import SIZES
from tests.perf.standin import ATLAS, number_of
from tests.perf.standin_rank import worker_of


class EightCards(DeviceLaboratory):
    """The real laboratory with all it does around a launch, on a machine that is told."""

    self_test = True
    fingerprint = Fingerprint(ATLAS)  # type: ignore[assignment]

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(Request("cpu"), self._told)
        self.settings = settings

    def why_not(self, configuration: Configuration) -> str | None:
        if self.settings.get("live"):
            return super().why_not(configuration)
        return None if configuration.cards > 1 else "this stand-in measures rows on several cards"

    def _told(self, job: Job) -> Measurement:
        with Path(self.settings["count"]).open("a", encoding="utf-8") as file:
            file.write(f"{job.configuration}\n")
        behaviour = self.settings.get("rank", "told_latencies")
        folder = Path(tempfile.mkdtemp(dir=Path(self.settings["count"]).parent))
        return launch(job, worker=worker_of(behaviour, json.dumps(self._latencies(job))), limit=60, folder=folder)

    def _latencies(self, job: Job) -> dict[str, Any]:
        what = job.configuration
        numbers = {phase: number_of(what, phase) for phase in PHASES}
        memory = memory_of(
            SIZES[what.model], what.step, what.batch, job.input_tokens, job.decode_steps, cards=what.cards
        )
        told: dict[str, Any] = {phase: number.ms for phase, number in numbers.items() if number is not None}
        return {**told, "peak_bytes": memory.total, "factors": self.settings.get("factors", {})}


def pytest_qwen2_npu_laboratory(config: pytest.Config) -> EightCards:
    return EightCards(json.loads(os.environ["LAUNCHED"]))
