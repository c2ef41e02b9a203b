"""Claims that stand for many tests: a test file, a step of the ladder in a suite, an operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import qwen2_npu
from qwen2_npu.conformance.graph import committed
from qwen2_npu.conformance.machine.verified import NOT_SAID, Verified, Where
from qwen2_npu.conformance.report import junit
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.optimizations import LADDER

TESTS = Path(qwen2_npu.__file__).parents[1] / "tests"
SUITES = ("accuracy", "graph", "perf")

FILES, OPERATORS, RATIOS = "Test files", "Operators", "Against the stock model"

LATENCY = "tests.perf.test_latency"
"""Its tests are claims of their own, see ``latency``."""

RATIO = ("tests.perf.test_relative", "test_ratio_to_the_stock_model")

Cases = list[tuple[junit.JUnitCase, Verified]]
"""Tests, each with what it was verified on."""

MESSAGES = 3
"""Failures that a claim shows; their number is said."""


@dataclass(frozen=True)
class Tally:
    """Many cases as one."""

    outcomes: Counter[junit.Outcome]
    status: Status
    verified: Verified
    message: str

    @classmethod
    def of(cls, cases: Iterable[tuple[junit.JUnitCase, Verified]]) -> Tally:
        """Any failure fails it; skipped tests alone do not pass."""
        known = list(cases)
        outcomes = Counter(case.outcome for case, _ in known)
        failed = [case for case, _ in known if case.outcome == "failed"]
        status = Status.FAIL if failed else Status.PASS if outcomes["passed"] else Status.NOT_RUN
        lines = [f"{case.function}[{case.parameters}]: {case.message}" for case in failed[:MESSAGES]]
        if len(failed) > MESSAGES:
            lines.append(f"and {len(failed) - MESSAGES} more")
        if not failed:
            reasons = Counter(case.message for case, _ in known if case.outcome == "skipped")
            lines = [f"{count} skipped: {reason}" for reason, count in reasons.most_common(MESSAGES)]
        verified = {verified for _, verified in known}
        # Sessions on different devices: none of them may speak for the others.
        return cls(outcomes, status, verified.pop() if len(verified) == 1 else NOT_SAID, "\n".join(lines))

    def __str__(self) -> str:
        kinds: tuple[junit.Outcome, ...] = ("passed", "failed", "skipped")
        return ", ".join(f"{self.outcomes[kind]} {kind}" for kind in kinds if self.outcomes[kind])

    def say(self, claim: Claim) -> Claim:
        """The claim with the result of the cases; unchanged where there are none."""
        if not self.outcomes:
            return claim
        return claim.found(self.status, verified=self.verified, reference=str(self), message=self.message)


def claims(inputs: RunInputs) -> list[Claim]:
    """What the run's tests say, latency rows and graphs aside."""
    cases = inputs.cases()
    return [*_steps(cases), *_operators(cases), *_ratios(cases), *_files(cases)]


def _steps(cases: Cases) -> Iterator[Claim]:
    """The accuracy suite, step by step."""
    for step in LADDER:
        about = [told for told in cases if told[0].module.startswith("tests.accuracy.") and step in told[0].tokens]
        claim = Claim(
            id=f"suite/accuracy/{step}",
            area="Accuracy",
            title=f"{step}: accuracy suite",
            step=step,
            label=labels().get(step, ""),
            place=Place("ladder", step, "Accuracy", "suite"),
        )
        yield Tally.of(about).say(claim)


def _operators(cases: Cases) -> Iterator[Claim]:
    from qwen2_npu.conformance.operators import CATALOGUE

    tested = [told for told in cases if told[0].module == "tests.accuracy.test_operators"]
    for name in CATALOGUE:
        about = [told for told in tested if told[0].tokens[0] == name]
        claim = Claim(f"operators/{name}", OPERATORS, f"{name}: agrees with its float64 golden")
        yield Tally.of(about).say(claim)


def _ratios(cases: Cases) -> Iterator[Claim]:
    """Speed against the stock model in the same run: a ratio with its interval."""
    for case, verified in cases:
        if (case.module, case.function) != RATIO:
            continue
        text = case.properties.get("ratio", "")
        if verified.where is Where.EMULATED:
            verified = Verified.of(Where.CPU, "this test measures the portable kernels")
        claim = Claim(f"relative/{case.parameters}", RATIOS, f"{case.parameters}: not slower than required")
        said = Tally.of([(case, verified)]).say(claim)
        number = text.split(" ")[0]
        if number:
            value = Value(float(number), "times as fast", lower_is_better=False)
            said = said.found(said.status, value=value, reference=text)
        yield said


def _files(cases: Cases) -> Iterator[Claim]:
    """Every test file of the suites that there is, and every one that ran; without what is a claim of its own."""
    known = _modules()
    by_module: dict[str, Cases] = {name: [] for name in known}
    for case, verified in cases:
        by_module.setdefault(case.module, []).append((case, verified))
    for module, about in by_module.items():
        rest = [(case, verified) for case, verified in about if not is_claimed(case)]
        if about and not rest:
            continue
        title = path(module) if module in known else module
        yield Tally.of(rest).say(
            Claim(f"files/{module}", FILES, f"{title}{': its other tests' if len(rest) < len(about) else ''}")
        )


@cache
def _modules() -> tuple[str, ...]:
    """The test files of the suites."""
    return tuple(f"tests.{suite}.{path.stem}" for suite in SUITES for path in sorted((TESTS / suite).glob("test_*.py")))


def path(module: str) -> str:
    """The file of a test module, as pytest is given it."""
    return f"{module.replace('.', '/')}.py"


def is_claimed(case: junit.JUnitCase) -> bool:
    """Whether a claim of its own speaks for this test: a step, an operator, a graph, a latency row, a ratio."""
    if case.module.startswith("tests.accuracy."):
        return any(token in LADDER or token.startswith(("npu_", "scatter_update")) for token in case.tokens)
    graph = any(case.parameters == str(graph) for graph in committed.graphs())
    return graph or (case.module, case.function) == RATIO or (case.module == LATENCY and bool(case.parameters))
