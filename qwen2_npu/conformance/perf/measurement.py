"""What one generate call showed, whoever held the clock. Milliseconds throughout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from qwen2_npu.optimizations import Phase

INPUT_TOKENS, OUTPUT_TOKENS = 1024, 1024
"""Per row, of every documented number."""

WALL_BELOW_DEVICE = 0.9
"""A host clock that shows less than this part of the device's own time was read before the device had finished."""


@dataclass(frozen=True)
class Measurement:
    """One generate call, warmed up before.

    Attributes:
        prefill_ms: of the first step: one sample.
        decode_ms: of every step after it.
        wall_ms: the host's clock around all steps, first one included, where ``prefill_ms`` and ``decode_ms`` are of
            the device's; empty where the host's clock is all there is.
        contexts: tokens in the cache before each step.
        input_tokens: of the prompt, per row.
        asked_steps: decode steps that were asked for.
        peak_bytes: the most device memory that was asked for at once, None where the device does not say.
        warnings: what was wrong with the host meanwhile.
        weights: "random", or the checkpoint's name.
        self_test: injected latencies: nothing was measured, and nothing may be recorded.
        of_ranks: faults that were found in the measurement of one of several ranks.
    """

    prefill_ms: float
    decode_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    contexts: tuple[int, ...]
    input_tokens: int
    asked_steps: int
    peak_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    weights: str = "random"
    self_test: bool = False
    of_ranks: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measurement:
        """From what JSON made of its fields (``dataclasses.asdict``)."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        times = {"prefill_ms": float(found["prefill_ms"]), "decode_ms": tuple(map(float, found["decode_ms"]))}
        return cls(**(found | times))

    @classmethod
    def slowest(cls, ranks: Sequence[Measurement]) -> Measurement:
        """Of one generate call that several ranks made together: in every step, the rank that took longest.

        The ranks' host clocks are judged here, each beside its own device's, and left out.
        """
        first, peaks = ranks[0], [each.peak_bytes for each in ranks]
        return replace(
            first,
            prefill_ms=max(each.prefill_ms for each in ranks),
            decode_ms=tuple(map(max, zip(*(each.decode_ms for each in ranks), strict=False))),
            wall_ms=(),
            peak_bytes=None if None in peaks else max(peak for peak in peaks if peak is not None),
            warnings=tuple(dict.fromkeys(warning for each in ranks for warning in each.warnings)),
            of_ranks=tuple(f"rank {rank}: {fault}" for rank, each in enumerate(ranks) for fault in each.faults()),
        )

    def samples(self, phase: Phase) -> tuple[float, ...]:
        """The milliseconds of a phase."""
        return (self.prefill_ms,) if phase == "prefill" else self.decode_ms

    @property
    def mean_context(self) -> float:
        """Tokens in the cache, the mean over the decode steps that were asked for."""
        return self.input_tokens + (self.asked_steps - 1) / 2

    def faults(self) -> list[str]:
        """Why these are not latencies of the protocol, whatever they are compared with."""
        if self.of_ranks:
            return list(self.of_ranks)
        found = []
        if len(self.decode_ms) != self.asked_steps:
            found.append(
                f"{len(self.decode_ms)} decode steps of {self.asked_steps} asked for: generation ended early "
                "(an end-of-sequence token, or a cache that is too small)"
            )
        steps = len(self.decode_ms) + 1
        wanted = (0, *range(self.input_tokens, self.input_tokens + steps - 1))
        if self.contexts != wanted:
            at, has, should = _first_difference(self.contexts, wanted)
            found.append(
                f"the KV cache does not grow by one token per step: before step {at} it holds {has} tokens, not "
                f"{should}"
            )
        samples = (self.prefill_ms, *self.decode_ms)
        if not all(math.isfinite(ms) and ms > 0 for ms in samples):
            found.append("a step of no duration: the clock did not run")
        for step, (wall, device) in enumerate(zip(self.wall_ms, samples, strict=False)):
            if wall < WALL_BELOW_DEVICE * device:
                found.append(
                    f"step {step}: the host waited {wall:.3f} ms for work that took the device {device:.3f} ms: "
                    "timing error, a synchronize is missing"
                )
                break
        return found


def _first_difference(found: Sequence[int], wanted: Sequence[int]) -> tuple[int, int | None, int | None]:
    assert found != wanted, "called on equal sequences"
    pairs = enumerate(zip_longest(found, wanted))
    return next((step, has, should) for step, (has, should) in pairs if has != should)


@dataclass(frozen=True)
class Summary:
    """The figures of one phase that are recorded and compared."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Of at least one sample. p99 is the smallest sample that 99 % do not exceed."""
        ordered = sorted(samples)
        rank = math.ceil(0.99 * len(ordered)) - 1
        return cls(statistics.fmean(ordered), statistics.median(ordered), ordered[rank])
