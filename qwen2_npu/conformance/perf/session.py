"""The gate of a pytest session: which rows there are, and that none of them passes unseen."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qwen2_npu.conformance.jobs import JobError
from qwen2_npu.conformance.machine import comparable, fingerprint
from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.perf import benchmark_json, documented
from qwen2_npu.conformance.perf.documented import BASELINES, BaselineError, Documented
from qwen2_npu.conformance.perf.gate import Against, Verdict, judge
from qwen2_npu.conformance.perf.ledger import Ledger
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.memory import MemoryFormula, memory_of
from qwen2_npu.conformance.perf.recorded import Recorded
from qwen2_npu.conformance.perf.replay import Replay
from qwen2_npu.conformance.perf.rows import Configuration, Row
from qwen2_npu.conformance.perf.runner import Runner

EVERY_ROW = "*"
PARALLEL = "xdist is active, and times of parallel tests mean nothing: drop -n"


@dataclass(frozen=True)
class GateOptions:
    """The session's options.

    Attributes:
        strict: --gate.
        scope: --gate-rows: patterns of row ids, separated by commas.
        reason: --update-baselines, or None.
        parallel: xdist is active: times mean nothing.
    """

    strict: bool
    scope: str
    reason: str | None
    parallel: bool


class LatencyGate:
    """One per session; tests get it as the fixture ``latency_gate``."""

    def __init__(
        self, options: GateOptions, runner: Runner, user_rows: Sequence[Row] = (), baselines: Path = BASELINES
    ) -> None:
        self.options = options
        self.runner = runner
        self.baselines = baselines
        self.ledger = Ledger()
        self.documented: dict[str, Documented] = documented.by_id(baselines / documented.SOURCE)
        every = [*(number.row for number in self.documented.values()), *user_rows]
        self.rows = _in_scope(every, options.scope)
        self.outside = len(every) - len(self.rows)

    # ---- one row ------------------------------------------------------------------------------------------------
    def check(self, node: pytest.Item, row_id: str, benchmark: Any) -> None:
        """Measure and judge the row of ``node``; the test fails, is skipped, or passes by what comes of it."""
        row = self.rows[row_id]
        if self.options.strict:
            self._refuse_silence(node, row, benchmark)
        measurable = self._why_not(row)
        if measurable is not None:
            self.not_run(row, measurable)
        try:
            measurement = self.runner.measured(row.configuration)
        except JobError as error:
            pytest.fail(f"row {row.id}: {error}", pytrace=False)
        if measurement.samples(row.phase):
            _replay(node, benchmark, measurement.samples(row.phase))
        verdict = self._judge(row)
        self.ledger.verdicts[row.id] = verdict
        if self.options.reason is not None:
            self._record(row, verdict, self.options.reason)
        benchmark.extra_info.update(self._facts(row, verdict))
        if verdict.failures:
            pytest.fail(str(verdict), pytrace=False)

    def not_run(self, row: Row, reason: str) -> NoReturn:
        """Skip the test of ``row``; under --gate, fail it."""
        self.ledger.not_run[row.id] = reason
        if self.options.strict:
            pytest.fail(f"row {row.id} was not run: {reason}", pytrace=False)
        pytest.skip(reason)

    def why_not_configuration(self, configuration: Configuration, *, documented_row: bool) -> str | None:
        """Why nothing measured here could be compared; None where it can."""
        conditions = next(iter(self.documented.values())).conditions
        if documented_row:
            foreign = comparable.not_comparable(self.runner.fingerprint, conditions.machine)
            if foreign is not None:
                return foreign
        elif self.runner.fingerprint.where is Where.EMULATED:
            return "an emulated NPU computes on the CPU: its latency is not the latency of an NPU"
        return self.runner.why_not(configuration)

    def _why_not(self, row: Row) -> str | None:
        return self.why_not_configuration(row.configuration, documented_row=row.id in self.documented)

    def _refuse_silence(self, node: pytest.Item, row: Row, benchmark: Any) -> None:
        if self.options.parallel:
            pytest.fail(f"row {row.id}: {PARALLEL}", pytrace=False)
        if benchmark.disabled:
            pytest.fail(f"row {row.id}: benchmarks are disabled: drop --benchmark-disable", pytrace=False)
        if node.nodeid != row.node_id:
            pytest.fail(
                f"row {row.id}: this test is {node.nodeid}, its baselines are kept under {row.node_id}: "
                "renamed, moved, or run with another rootdir",
                pytrace=False,
            )

    def _judge(self, row: Row) -> Verdict:
        measurement = self.runner.measured(row.configuration)
        number = self.documented.get(row.id)
        card, why_no_card = comparable.card_of(self.runner.fingerprint)
        store = Recorded(self.baselines, self.runner.fingerprint)
        recorded, unusable = None, ""
        if self.options.reason is None:
            try:
                recorded = store.baseline(row)
            except BaselineError as error:
                unusable = str(error)
        against = Against(
            documented=number,
            transformers=str(self.runner.fingerprint.identity["transformers"]),
            recorded=recorded,
            card=card,
            why_no_card=why_no_card,
            memory=self._memory(row, measurement),
            elsewhere=store.elsewhere(row),
        )
        label = number.label if number is not None else ""
        size = self.runner.size(row.configuration)
        verdict = judge(row, size, measurement, against, strict=self.options.strict, label=label)
        if unusable:
            verdict.failures.append(unusable)
        return verdict

    def _memory(self, row: Row, measurement: Measurement) -> MemoryFormula | None:
        identity = self.runner.fingerprint.identity
        if identity.get("device") != "npu":  # elsewhere the operators are made of others, with memory of their own
            return None
        what = row.configuration
        return memory_of(
            self.runner.size(what),
            what.step,
            what.batch,
            measurement.input_tokens,
            measurement.asked_steps,
            cards=what.cards,
            float32_logits=str(identity.get("transformers")).startswith("4."),
        )

    def _facts(self, row: Row, verdict: Verdict) -> dict[str, Any]:
        """For pytest-benchmark's JSON and what is drawn from it."""
        measurement = self.runner.measured(row.configuration)
        return {
            "row": row.id,
            "label": verdict.label,
            **asdict(row.configuration),
            "phase": row.phase,
            "mean_ms": verdict.summary.mean,
            "median_ms": verdict.summary.median,
            "p99_ms": verdict.summary.p99,
            "floor_ms": verdict.floor_ms,
            "peak_bytes": measurement.peak_bytes,
            "input_tokens": measurement.input_tokens,
            "decode_steps": measurement.asked_steps,
            "weights": measurement.weights,
            "fingerprint": self.runner.fingerprint.name,
            "self_test": measurement.self_test,
            "passed": verdict.passed,
            "failures": list(verdict.failures),
            "notes": list(verdict.notes),
            "compared": [comparison.__dict__ for comparison in verdict.comparisons],
        }

    def _record(self, row: Row, verdict: Verdict, reason: str) -> None:
        """Record the row; what is refused fails it, and what failed is not recorded."""
        if verdict.passed:
            store = Recorded(self.baselines, self.runner.fingerprint)
            measurement = self.runner.measured(row.configuration)
            try:
                baseline = store.record(row, measurement, reason, fingerprint.commit())
            except BaselineError as error:
                verdict.failures.append(str(error))
            else:
                self.ledger.recorded[row.id] = len(baseline.runs)
                return
        self.ledger.unrecorded.append(row.id)

    # ---- the whole session --------------------------------------------------------------------------------------
    def reproaches(self) -> list[str]:
        """Why a session may not pass although every test that ran did."""
        found = []
        if self.options.parallel:
            found.append(PARALLEL)
        try:
            benchmark_json.check(list(documented.read(self.baselines / documented.SOURCE)), self.baselines)
        except BaselineError as error:
            found.append(str(error))
        return [*found, *self.ledger.unjudged(list(self.rows.values()))]

    def summary(self) -> list[str]:
        """Lines for the terminal; empty where no row was touched."""
        if not (self.ledger.verdicts or self.ledger.not_run or self.options.strict):
            return []
        return list(
            self.ledger.lines(
                machine=self.runner.fingerprint.name,
                scope=self.options.scope,
                outside=self.outside,
                strict=self.options.strict,
            )
        )


class EveryRowWasJudged(pytest.Item):
    """The last test under --gate: whatever the selection left out is its failure, seen by JUnit."""

    gate: LatencyGate

    def runtest(self) -> None:
        reproaches = self.gate.reproaches()
        if reproaches:
            pytest.fail("\n".join(reproaches), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, "every row was judged"


def _in_scope(rows: Sequence[Row], scope: str) -> dict[str, Row]:
    """The rows that the patterns of ``scope`` name, by id.

    Raises:
        pytest.UsageError: a pattern that names none: mistyped, it would leave its rows out unseen.
    """
    patterns = [pattern.strip() for pattern in scope.split(",")]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.id, pattern) for row in rows):
            raise pytest.UsageError(f"--gate-rows={pattern} matches none of {len(rows)} rows, as {rows[0].id}")
    return {row.id: row for row in rows if any(fnmatch.fnmatchcase(row.id, pattern) for pattern in patterns)}


def _replay(node: pytest.Item, benchmark: Any, samples: Sequence[float]) -> None:
    """Give pytest-benchmark the samples; see :mod:`replay`."""
    mark = node.get_closest_marker("benchmark")
    clock = None if mark is None else mark.kwargs.get("timer")
    assert isinstance(clock, Replay), f"{node.nodeid} has no replayed clock: parametrise it with `row_id` alone"
    clock.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)  # the work was done before
