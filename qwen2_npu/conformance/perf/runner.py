"""Who measures: the device at hand, one generate call per configuration, kept for both phases' tests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qwen2_npu.conformance.machine import fingerprint
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.measurement import OUTPUT_TOKENS, Measurement
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size


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
        decode_steps: None for the guide's 1023.
    """

    device: str
    random_weights: str | None = None
    model_path: Path | None = None
    decode_steps: int | None = None


class DeviceRunner:
    """Measures on ``request.device``, one card, in this process.

    Holds one model at a time: two of 7B do not fit a card of 32 GB.
    """

    self_test = False

    def __init__(self, request: Request) -> None:
        self.request = request
        self._measured: dict[Configuration, Measurement] = {}
        self._model: tuple[Configuration, Any] | None = None

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint.of_device(self.request.device)

    @cached_property
    def model_name(self) -> str | None:
        """Name of the one model the user named; None for any size."""
        if self.request.model_path is not None:
            from qwen2_npu.conformance.perf.builds import Weights

            return Weights.of_checkpoint(self.request.model_path).size.name
        return self.request.random_weights

    def why_not(self, configuration: Configuration) -> str | None:
        if configuration.cards > 1:
            return f"needs tensor parallel: {configuration.model} runs on {configuration.cards} cards"
        if self.model_name not in (None, configuration.model):
            return f"needs the {configuration.model} model: {self.model_name} was asked for"
        return None

    def size(self, configuration: Configuration) -> Size:
        if configuration.model in SIZES:
            return SIZES[configuration.model]
        return self._weights(configuration).size

    def measured(self, configuration: Configuration) -> Measurement:
        if configuration not in self._measured:
            self._measured[configuration] = self._measure(configuration)
        return self._measured[configuration]

    def _measure(self, configuration: Configuration) -> Measurement:
        from qwen2_npu.conformance.perf import protocol

        asked = self.request.decode_steps
        steps = OUTPUT_TOKENS - 1 if asked is None else asked
        weights = self._weights(configuration)
        return protocol.measure(
            self._built(configuration, weights.build),
            batch=configuration.batch,
            decode_steps=steps,
            weights=weights.description,
        )

    def _weights(self, configuration: Configuration) -> Any:
        from qwen2_npu.conformance.perf.builds import Weights

        if self.request.model_path is not None:
            return Weights.of_checkpoint(self.request.model_path)
        return Weights.random(configuration.model)

    def _built(self, configuration: Configuration, build: Callable[..., Any]) -> Any:
        """The model, shared by configurations that differ in the batch alone."""
        wanted = Configuration(configuration.model, configuration.cards, 0, configuration.mode, configuration.step)
        if self._model is None or self._model[0] != wanted:
            self._model = None
            gc.collect()
            self._model = (wanted, build(configuration, self.request.device))
        return self._model[1]
