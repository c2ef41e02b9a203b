"""Who measures: the device at hand, one generate call per configuration, kept for both phases' tests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qwen2_npu.conformance import jobs
from qwen2_npu.conformance.jobs import JobError
from qwen2_npu.conformance.machine import fingerprint
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.measurement import OUTPUT_TOKENS, Measurement
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.parallel import job


class Runner(Protocol):
    """What the session needs of whoever measures.

    Attributes:
        self_test: latencies are injected: said everywhere, recorded nowhere.
    """

    self_test: bool

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the machine that measures."""

    @property
    def model_name(self) -> str | None:
        """Name of the one model the user named; None for any size."""

    def why_not(self, configuration: Configuration) -> str | None:
        """The reason why this configuration cannot be measured here; None if it can."""

    def size(self, configuration: Configuration) -> Size:
        """The numbers of the configuration's model."""

    def measured(self, configuration: Configuration) -> Measurement:
        """Its measurement, made on the first call."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        random_weights: name of a size, or None.
        model_path: a checkpoint folder, or None. With neither, every size is measured with random weights.
        assume_tp: for how many ranks it was merged, where it does not record that.
        decode_steps: None for the guide's 1023.
    """

    device: str
    random_weights: str | None = None
    model_path: Path | None = None
    assume_tp: int | None = None
    decode_steps: int | None = None


class DeviceRunner:
    """Measures on ``request.device``: a row on one card in this process, one on several in a job of as many ranks.

    Holds one model at a time: two of 7B do not fit a card of 32 GB. While a job runs it holds none.

    Attributes:
        rank_module: what every rank of a job runs; see :mod:`.rank`.
        job_seconds: a job may take; ranks that wait for one another are ended long before (docs/parallel.md).
    """

    self_test = False
    rank_module = "qwen2_npu.conformance.perf.rank"
    job_seconds = 7200.0

    def __init__(self, request: Request) -> None:
        self.request = request
        self._measured: dict[Configuration, Measurement | JobError] = {}
        self._model: tuple[Configuration, Any] | None = None

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint.of_device(self.request.device)

    @cached_property
    def model_name(self) -> str | None:
        if self.request.model_path is not None:
            return str(self._weights("").size.name)
        return self.request.random_weights

    def why_not(self, configuration: Configuration) -> str | None:
        if self.model_name not in (None, configuration.model):
            return f"needs the {configuration.model} model: {self.model_name} was asked for"
        if configuration.cards == 1:
            return None
        return job.why_not(self.request.device, configuration.cards, int(self.fingerprint.identity["cards"]))

    def size(self, configuration: Configuration) -> Size:
        if configuration.model in SIZES:
            return SIZES[configuration.model]
        return self._weights(configuration.model).size

    def measured(self, configuration: Configuration) -> Measurement:
        """Its measurement, made on the first call.

        Raises:
            JobError: the ranks that were to make it failed. Once is enough: the other phase has the same cause.
        """
        if configuration not in self._measured:
            measure = self._measure if configuration.cards == 1 else self._measure_in_ranks
            try:
                self._measured[configuration] = measure(configuration)
            except JobError as error:
                self._measured[configuration] = error
        found = self._measured[configuration]
        if isinstance(found, JobError):
            raise found
        return found

    @property
    def _decode_steps(self) -> int:
        return OUTPUT_TOKENS - 1 if self.request.decode_steps is None else self.request.decode_steps

    def _measure_in_ranks(self, configuration: Configuration) -> Measurement:
        from qwen2_npu.conformance.machine.memory import release

        self._model = None
        release(self.request.device)
        path, own = self.request.model_path, self.fingerprint.identity["verified"]
        request = {
            "configuration": asdict(configuration),
            "model_path": None if path is None else str(path.resolve()),
            "assume_tp": self.request.assume_tp,
            "decode_steps": self._decode_steps,
        }
        ranks = jobs.JobOfRanks(self.rank_module, configuration.cards, self.request.device, self.job_seconds)
        found = jobs.ask(str(configuration), ranks, request)
        if found["verified"] != own:
            raise JobError(f"{configuration}: the ranks computed on {found['verified']}, and this process on {own}")
        return Measurement.from_json(found["measurement"])

    def _measure(self, configuration: Configuration) -> Measurement:
        from qwen2_npu.conformance.perf import protocol

        weights = self._weights(configuration.model)
        return protocol.measure(
            self._built(configuration, weights.build),
            batch=configuration.batch,
            decode_steps=self._decode_steps,
            weights=weights.description,
        )

    def _weights(self, model: str) -> Any:
        from qwen2_npu.conformance.perf.builds import Weights

        return Weights.of(model, self.request.model_path, self.request.assume_tp)

    def _built(self, configuration: Configuration, build: Callable[..., Any]) -> Any:
        """The model, shared by configurations that differ in the batch alone."""
        wanted = Configuration(configuration.model, configuration.cards, 0, configuration.mode, configuration.step)
        if self._model is None or self._model[0] != wanted:
            self._model = None
            gc.collect()
            self._model = (wanted, build(configuration, self.request.device))
        return self._model[1]
