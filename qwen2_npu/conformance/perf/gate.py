"""The verdict on one row: what it was compared with, and every reason to fail it. Pure: no clock, no device, no pytest.

Documented rows fail where they are slower than the printed number by more than 10 % and its rounding. Recorded rows
fail in both directions outside the margin of their runs. Whatever a row is compared with, it fails below its physical
floor, where the measurement does not follow the protocol, and where its memory is not the formula's. ``strict``
(--gate) adds what would otherwise pass in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen2_npu.conformance.machine.hardware import Hardware
from qwen2_npu.conformance.perf import lower_bound
from qwen2_npu.conformance.perf.documented import Documented, other_stock, stock_name, why_not_row
from qwen2_npu.conformance.perf.measurement import Measurement, Summary
from qwen2_npu.conformance.perf.memory import MemoryFormula
from qwen2_npu.conformance.perf.prediction_interval import MINIMUM_RUNS
from qwen2_npu.conformance.perf.recorded import STATISTICS, Baseline, protocol
from qwen2_npu.conformance.perf.rows import Row
from qwen2_npu.conformance.sizes import Size

TOLERANCE = 1.10
"""Of a documented number: one rerun of a whole table on another day and card stays within it."""


def limit_ms(number: Documented) -> float:
    """The slowest that still passes."""
    return number.ms * TOLERANCE + number.conditions.rounding


@dataclass(frozen=True)
class LatencyComparison:
    """One figure of the row beside what it was held against. ``low`` is None where only slower fails."""

    against: str
    statistic: str
    measured_ms: float
    baseline_ms: float
    low: float | None
    high: float

    @property
    def failure(self) -> str | None:
        change = self.measured_ms / self.baseline_ms - 1
        figures = f"{self.statistic} {self.measured_ms:.4g} ms against {self.baseline_ms:.4g} ms {self.against}"
        figures += f" ({change:+.1%})"
        if self.measured_ms > self.high:
            return f"slower: {figures}, limit {self.high:.4g} ms"
        if self.low is not None and self.measured_ms < self.low:
            return f"faster: {figures}, limit {self.low:.4g} ms: update the baseline with --update-baselines=REASON"
        return None


@dataclass
class Verdict:
    """All that is to be said of one row. It passes without ``failures``; ``notes`` are said and fail nothing."""

    row: Row
    label: str
    self_test: bool
    summary: Summary
    floor_ms: float | None
    comparisons: list[LatencyComparison] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        heading = "SELF-TEST, injected latencies: " if self.self_test else ""
        name = f"{self.row.configuration}, {self.row.phase}"
        label = f" ({self.label})" if self.label else ""
        lines = [
            f"{heading}row {self.row.id}{label}: {name}",
            *self.failures,
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Against:
    """What a row is compared with on this machine.

    Attributes:
        documented: None where the machine is not what was documented.
        recorded: None where this very machine has no runs of the row.
        card: None where nothing is known of it.
        why_no_card: said under ``strict`` where ``card`` is None; empty where no floor is expected.
        transformers: the installed version.
        memory: the formula of the device's memory; None where there is none to measure.
        elsewhere: recorded on other machines: for the message alone.
    """

    documented: Documented | None = None
    transformers: str = ""
    recorded: Baseline | None = None
    card: Hardware | None = None
    why_no_card: str = ""
    memory: MemoryFormula | None = None
    elsewhere: Sequence[str] = ()


def judge(
    row: Row, size: Size, measurement: Measurement, against: Against, *, strict: bool, label: str = ""
) -> Verdict:
    """The verdict of the module's text.

    Args:
        label: the row's name in its table.
    """
    samples = measurement.samples(row.phase)
    faults = measurement.faults()
    if not samples:
        return Verdict(row, label, measurement.self_test, Summary(0.0, 0.0, 0.0), None, failures=faults)
    floor_ms = _floor_ms(row, size, measurement, against.card)
    verdict = Verdict(row, label, measurement.self_test, Summary.of(samples), floor_ms, failures=faults)
    _check_floor(verdict, against, strict)
    if row.phase == "prefill":  # where the peak is
        _check_memory(verdict, measurement.peak_bytes, against.memory, strict)
    _compare_documented(verdict, measurement, against, strict)
    _compare_recorded(verdict, measurement, against.recorded, strict)
    if not verdict.comparisons:
        elsewhere = f"; {'; '.join(against.elsewhere)}" if against.elsewhere else ""
        text = f"no baseline to compare with: record {MINIMUM_RUNS} runs with --update-baselines=REASON{elsewhere}"
        (verdict.failures if strict else verdict.notes).append(text)
    (verdict.failures if strict else verdict.notes).extend(f"host: {warning}" for warning in measurement.warnings)
    verdict.failures += [failure for comparison in verdict.comparisons if (failure := comparison.failure)]
    return verdict


def _floor_ms(row: Row, size: Size, measurement: Measurement, card: Hardware | None) -> float | None:
    if card is None:
        return None
    what = row.configuration
    tokens = measurement.input_tokens if row.phase == "prefill" else measurement.mean_context
    return lower_bound.work(size, row.phase, what.batch, tokens, what.cards, step=what.step).floor_ms(card)


def _check_floor(verdict: Verdict, against: Against, strict: bool) -> None:
    if against.card is None:
        if against.why_no_card:
            (verdict.failures if strict else verdict.notes).append(f"no physical floor: {against.why_no_card}")
    elif verdict.floor_ms is not None and verdict.summary.mean < verdict.floor_ms:
        verdict.failures.append(
            f"timing error: {verdict.summary.mean:.4g} ms is below the physical floor of {verdict.floor_ms:.4g} ms on "
            f"{against.card.soc} (bytes / bandwidth, operations / peak): a missing synchronize, or another card"
        )


def _check_memory(verdict: Verdict, peak: int | None, memory: MemoryFormula | None, strict: bool) -> None:
    if memory is None:
        return
    if peak is None:
        (verdict.failures if strict else verdict.notes).append("memory: the device did not say what its peak was")
    elif (fault := memory.fault(peak)) is not None:
        verdict.failures.append(fault)


def _compare_documented(verdict: Verdict, measurement: Measurement, against: Against, strict: bool) -> None:
    number = against.documented
    if number is None:
        return
    if reason := other_stock(number, against.transformers):
        verdict.notes.append(f"shown as {stock_name(against.transformers)}: {reason}")
        return
    if reason := why_not_row(number, measurement.input_tokens, measurement.asked_steps, against.transformers):
        # Even less work must not be slower, so it is still compared.
        text = f"{reason}: a shorter context is less work; run without --decode-steps"
        (verdict.failures if strict else verdict.notes).append(text)
    conditions = number.conditions
    if number.note:
        verdict.notes.append(number.note)
    verdict.comparisons.append(
        LatencyComparison(
            f"documented on {conditions.machine}, SKU {conditions.sku}",
            "mean",
            verdict.summary.mean,
            number.ms,
            low=None,
            high=limit_ms(number),
        )
    )


def _compare_recorded(verdict: Verdict, measurement: Measurement, baseline: Baseline | None, strict: bool) -> None:
    if baseline is None:
        return
    # A documented row is judged without a recorded baseline, so an unfinished one is then worth a note alone.
    reproach = verdict.failures if strict and not verdict.comparisons else verdict.notes
    if dict(baseline.protocol) != protocol(measurement):
        differing = "; ".join(
            f"{key}: {baseline.protocol.get(key)} recorded, {value} now"
            for key, value in protocol(measurement).items()
            if baseline.protocol.get(key) != value
        )
        reproach.append(f"recorded by another protocol ({differing}): not compared")
        return
    if not baseline.complete:
        reproach.append(f"{len(baseline.runs)} of {MINIMUM_RUNS} runs recorded for {baseline.reason!r}: not compared")
        return
    statistics = STATISTICS if verdict.row.phase == "decode" else STATISTICS[:1]  # of one sample they are the same
    for statistic in statistics:
        try:
            interval = baseline.interval(statistic)
        except ValueError as error:
            verdict.failures.append(f"recorded baseline for {baseline.reason!r}: {error}")
            return
        if verdict.floor_ms is not None and interval.centre < verdict.floor_ms:
            verdict.failures.append(
                f"recorded baseline of {interval.centre:.4g} ms is below the physical floor of {verdict.floor_ms:.4g} "
                "ms: a placeholder, or a timing error that was recorded"
            )
            return
        if not interval.useful:
            verdict.failures.append(
                f"the {len(baseline.runs)} recorded runs spread so far that the next may differ by "
                f"{interval.factor - 1:.0%}: no gate. Quiet the host (see the host's warnings) and record them again "
                "with another reason"
            )
            return
        against = f"recorded in {len(baseline.runs)} runs for {baseline.reason!r}"
        measured = getattr(verdict.summary, statistic)
        verdict.comparisons.append(
            LatencyComparison(against, statistic, measured, interval.centre, interval.low, interval.high)
        )
