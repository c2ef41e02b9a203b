"""pytest-benchmark's clock for latencies that were measured inside a generate call.

``benchmark.pedantic`` times a call itself; a decode step cannot be repeated, and both phases come from one call. So
the test hands the measured samples to this clock, which is the ``timer`` of its benchmark mark, and lets pedantic run
as many empty rounds: its statistics, tables, JSON and ``--benchmark-compare`` then are those of the real steps.
"""

from __future__ import annotations

from collections.abc import Sequence


class Replay:
    """Reads 0 at the start of every round, and at its end the next sample."""

    __name__ = "replayed device time"

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._running = False

    def load(self, milliseconds: Sequence[float]) -> None:
        """The samples of the rounds to come."""
        self._samples = [sample / 1e3 for sample in reversed(milliseconds)]
        self._running = False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else self._samples.pop()
