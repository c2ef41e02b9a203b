"""What became of every row of a session, in words for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qwen2_npu.conformance.perf.gate import TOLERANCE, Verdict
from qwen2_npu.conformance.perf.rows import Row


@dataclass
class Ledger:
    """Filled by the tests of a session.

    Attributes:
        verdicts: row id -> verdict of what was measured.
        not_run: row id -> reason.
        recorded: row id -> runs its baseline now has.
        unrecorded: ids of rows that were to be recorded and failed.
    """

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    recorded: dict[str, int] = field(default_factory=dict)
    unrecorded: list[str] = field(default_factory=list)

    def unjudged(self, rows: Sequence[Row]) -> list[str]:
        """What a gate has to say of rows without a verdict: nobody asked, or they could not run."""
        found = []
        missing = [row for row in rows if row.id not in self.verdicts and row.id not in self.not_run]
        if missing:
            names = ", ".join(row.node_id for row in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            found.append(
                f"{len(missing)} rows have a baseline and no test ran for them: deselected, renamed, or another "
                f"rootdir: {names}{more}"
            )
        for reason, count in Counter(self.not_run[row.id] for row in rows if row.id in self.not_run).items():
            found.append(f"{count} rows not run: {reason}")
        return found

    def lines(self, *, machine: str, scope: str, outside: int, strict: bool) -> Iterator[str]:
        """The terminal summary: what was compared, against what, and what was not run."""
        if any(verdict.self_test for verdict in self.verdicts.values()):
            yield "SELF-TEST: latencies were injected, nothing was measured, nothing is recorded"
        yield f"machine: {machine}"
        against: dict[str, list[Verdict]] = {}
        for verdict in self.verdicts.values():
            for source in {_kind(comparison.against) for comparison in verdict.comparisons} or {"nothing"}:
                against.setdefault(source, []).append(verdict)
        for source, verdicts in against.items():
            bad = [verdict for verdict in verdicts if not verdict.passed]
            limit = f" (mean at most × {TOLERANCE:.2f} and the rounding)" if source.startswith("documented") else ""
            passed = "" if source == "nothing" and not bad else f", {len(verdicts) - len(bad)} passed"
            yield f"compared with {source}{limit}: {len(verdicts)} rows{passed}"
            for verdict in bad:
                yield f"  FAILED {verdict.row.id}: {'; '.join(verdict.failures)}"
        for reason, count in Counter(self.not_run.values()).items():
            yield f"not run: {count} rows: {reason}"
        if outside:
            yield f"outside of --gate-rows={scope}: {outside} rows, neither run nor gated"
        if self.recorded:
            for runs, count in sorted(Counter(self.recorded.values()).items()):
                yield f"recorded: {count} rows, whose baselines now have {runs} runs"
        if self.unrecorded:
            yield f"not recorded: {len(self.unrecorded)} rows, which failed as said above"
        if not strict:
            yield "without --gate a row that is not compared passes"


def _kind(against: str) -> str:
    """Recorded baselines of many reasons are one line."""
    return against if against.startswith("documented") else "baselines recorded on this machine"
