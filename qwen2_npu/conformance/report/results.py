"""A whole run: its claims, what it was verified on, and what is wrong with its files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qwen2_npu.conformance.machine.provenance import Provenance, merged
from qwen2_npu.conformance.report import accuracy, bench, figures, graphs, latency, stages, suites
from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import RunInputs, reason

AREAS = (accuracy, suites, graphs, latency, bench, stages)


def _fault(alone: RunInputs) -> str:
    """Why one file, well-formed as it is, does not hold what its name says; empty where it does."""
    try:
        sorted(provenance.fingerprint.digest for _, provenance in alone.stated())  # raises for text that is not Unicode
        for area in AREAS:
            for claim in area.claims(alone):
                claim.check()
        _self_test(alone)
        figures.steps(alone)
        bench.tables(alone)
    except Exception as error:  # the page must be made whatever a file holds
        return f"not what this version writes ({reason(error)})"
    return ""


def _self_test(inputs: RunInputs) -> bool:
    return any(
        content.get("self_test") or any((b.get("extra_info") or {}).get("self_test") for b in content["benchmarks"])
        for content in inputs.benchmarks.values()
    )


@dataclass(frozen=True)
class Results:
    """``problems``: files that cannot be read, inputs that contradict one another."""

    inputs: RunInputs
    provenance: Provenance
    claims: tuple[Claim, ...]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Results:
        """Everything that the files in ``folder`` say, and everything they leave unsaid."""
        inputs = RunInputs.of(folder)
        for name, alone, leave_out in inputs.one_by_one():
            if fault := _fault(alone):
                leave_out()
                inputs.problems.append(f"{name} cannot be read: {fault}")
        provenance, contradictions = merged(inputs.stated())
        claims = tuple(claim for area in AREAS for claim in area.claims(inputs))
        twice = [id for id, count in Counter(claim.id for claim in claims).items() if count > 1]
        problems = [*inputs.problems, *contradictions, *(f"{id} is claimed twice" for id in twice)]
        return cls(inputs, provenance, claims, tuple(problems))

    @property
    def self_test(self) -> bool:
        """Whether latencies of this run were injected."""
        return _self_test(self.inputs)

    def counts(self) -> dict[Status, int]:
        """Claims per status."""
        return {status: sum(claim.status is status for claim in self.claims) for status in Status}

    @property
    def passed(self) -> bool:
        """Whether anything passed and nothing failed. What was not run is said elsewhere."""
        counts = self.counts()
        return counts[Status.PASS] > 0 and counts[Status.FAIL] == 0 and not self.problems
