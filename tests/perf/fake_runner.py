"""A stand-in for the machine, for tests of the gate itself: it measures nothing and says so.

As a plugin (``-p tests.perf.fake_runner``) it takes the runner's place in a pytest session. It claims to be an Atlas
800I A2 and returns, for every documented row, the documented latency: changed as the environment variable FAKE_RUNNER
says, as JSON:

    factor      × every latency                     rows        row id -> factor, in place of ``factor``
    past        + milliseconds on every latency     limit       true: start from the slowest that passes
    changes     fields of Measurement               identity    fields of the fingerprint
    baselines   folder of baselines                 why_not     the reason why nothing can be measured
    job_fails   what a job of several ranks says
    model       a model the user named, 100 ms prefill and 50 ms decode
    recordable  true: do not say self-test, so that recording can be tested (into a temporary folder)
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.jobs import JobError
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.documented import BASELINES, Documented
from qwen2_npu.conformance.perf.gate import limit_ms
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.memory import memory_of
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.optimizations import PHASES

ATLAS: dict[str, Any] = {
    "device": "npu",
    "verified": "npu (stand-in)",
    "soc": "Ascend910B4",
    "product": None,
    "machine": "aarch64",
    "transformers": "4.37.0",
}
INPUT_TOKENS, DECODE_STEPS = 1024, 1023


def number_of(configuration: Configuration, phase: str) -> Documented | None:
    """The documented number of a configuration, in whichever table stands first."""
    wanted = (configuration, phase)
    return next((n for n in documented.read() if (n.row.configuration, n.row.phase) == wanted), None)


def measurement_of(milliseconds: dict[str, float], **changes: Any) -> Measurement:
    """A flawless measurement by the guide's protocol, with these latencies of prefill and decode."""
    plain = Measurement(
        prefill_ms=milliseconds["prefill"],
        decode_ms=(milliseconds["decode"],) * DECODE_STEPS,
        wall_ms=(),
        contexts=(0, *range(INPUT_TOKENS, INPUT_TOKENS + DECODE_STEPS)),
        input_tokens=INPUT_TOKENS,
        asked_steps=DECODE_STEPS,
        self_test=True,
    )
    return dataclasses.replace(plain, **changes)


class FakeRunner:
    """See the module's text.

    Args:
        settings: what FAKE_RUNNER holds.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.self_test = not settings.get("recordable", False)
        self.fingerprint = Fingerprint.read(ATLAS | settings.get("identity", {}))
        self.model_name: str | None = settings.get("model")

    def why_not(self, configuration: Configuration) -> str | None:
        reason: str | None = self.settings.get("why_not")
        return reason

    def size(self, configuration: Configuration) -> Size:
        return SIZES[configuration.model]

    def measured(self, configuration: Configuration) -> Measurement:
        if "job_fails" in self.settings:
            raise JobError(self.settings["job_fails"])
        milliseconds = {phase: self._latency(configuration, phase) for phase in PHASES}
        changes = {key: tuple(v) if isinstance(v, list) else v for key, v in self.settings.get("changes", {}).items()}
        memory = memory_of(
            self.size(configuration), configuration.step, configuration.batch, INPUT_TOKENS, DECODE_STEPS,
            cards=configuration.cards,
        )  # fmt: skip
        changes.setdefault("peak_bytes", memory.total)
        return measurement_of(milliseconds, self_test=self.self_test, **changes)

    def _latency(self, configuration: Configuration, phase: str) -> float:
        number = number_of(configuration, phase)
        if number is None:
            base, name = {"prefill": 100.0, "decode": 50.0}[phase], ""
        else:
            base, name = limit_ms(number) if self.settings.get("limit") else number.ms, number.row.id
        factor = self.settings.get("rows", {}).get(name, self.settings.get("factor", 1.0))
        return base * factor + self.settings.get("past", 0.0)


def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ.get("FAKE_RUNNER", "{}"))
    return found


def pytest_qwen2_npu_runner(config: pytest.Config) -> FakeRunner:
    return FakeRunner(settings())


def pytest_qwen2_npu_baselines(config: pytest.Config) -> Path:
    return Path(settings().get("baselines", BASELINES))


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """pytest-benchmark's own takes a second to ask the CPU."""
    return {"node": "stand-in", "machine": "aarch64", "system": "Linux", "cpu": {}}
