"""What is measured: a configuration (one generate call), and its two rows, prefill and decode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qwen2_npu.optimizations import PHASES, QUANTIZED, Phase

Mode = Literal["eager", "graph"]
"""The guide's 单算子模式 and 图模式. Which compiler serves "graph" is the device's affair, see ``builds``."""

MODES: tuple[Mode, ...] = ("eager", "graph")

TEST = "tests/perf/test_latency.py::test_latency"
"""The test that measures every row. pytest-benchmark matches by node id, so its name is part of every baseline."""

USER_TABLE = "user"
"""Table of the rows no document has: a model the user named."""


@dataclass(frozen=True)
class Configuration:
    """What one generate call measures.

    Attributes:
        model: name of the size ("7B"), or of the user's checkpoint.
        cards: it is split over.
        step: a step of the ladder, meaning up to it; or ``original``.
    """

    model: str
    cards: int
    batch: int
    mode: Mode
    step: str

    @property
    def model_on_cards(self) -> str:
        return f"{self.model} on {self.cards} cards" if self.cards > 1 else self.model

    def __str__(self) -> str:
        return f"{self.model_on_cards}, batch {self.batch}, {self.mode}, {self.step}"


@dataclass(frozen=True)
class Row:
    """One phase of a configuration, in one table."""

    table: str
    configuration: Configuration
    phase: Phase

    @property
    def id(self) -> str:
        """Unique, and stable: baselines are kept under it."""
        what = self.configuration
        return f"{self.table}-b{what.batch}-{what.mode}-{what.step}-{self.phase}"

    @property
    def node_id(self) -> str:
        """Node id of its test, with the repository as rootdir."""
        return f"{TEST}[{self.id}]"


def weights_of(description: str, dtype: str, steps: Iterable[str]) -> str:
    """``random weights``; where steps of 8-bit weights are among them, ``random weights in bfloat16, w8a16``."""
    kinds = dict.fromkeys(step if step in QUANTIZED else dtype for step in steps)
    return f"{description} weights" + (f" in {', '.join(kinds)}" if set(QUANTIZED) & set(kinds) else "")


def user_rows(model: str, batches: tuple[int, ...], modes: tuple[Mode, ...], steps: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of a model that the user named, on one card."""
    return tuple(
        Row(f"{model.lower()}-{USER_TABLE}", Configuration(model, 1, batch, mode, step), phase)
        for step in steps
        for mode in modes
        for batch in batches
        for phase in PHASES
    )
