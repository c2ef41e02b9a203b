"""Claims of the nightly run's own stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2_npu.conformance.report import stages
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.inputs import RunInputs
from tests.unit.conformance.report.synthetic import Night


def stage(name: str, status: int | None, problem: str = "", *makes: str) -> dict[str, Any]:
    entry = {"name": name, "command": "pytest", "status": status, "seconds": 3.0, "problem": problem}
    return {**entry, "makes": list(makes)}


def test_status_of_every_stage() -> None:
    run = {"stages": [stage("a", 0), stage("b", 2, "see logs/b.log"), stage("c", None)]}
    good, bad, later = stages.claims(RunInputs(Path(), run=run))
    assert [claim.status for claim in (good, bad, later)] == [Status.PASS, Status.FAIL, Status.NOT_RUN]
    assert (bad.id, bad.message, bad.reference) == ("stages/b", "see logs/b.log", "exit status 2, 3 s: pytest")


def test_no_run_no_stages() -> None:
    assert stages.claims(RunInputs(Path())) == []


def test_a_stage_that_found_failures_ran_to_its_end(tmp_path: Path) -> None:
    """They are claims of their own; another status, or nothing found, is the stage's own failure."""
    night = Night(0, wrong_steps=frozenset({"swiglu"}))
    inputs = RunInputs.of(night.write(tmp_path))
    found = [
        stage("verify", 1, "", "verify.json"),
        stage("accuracy", 1, "", "accuracy.xml"),
        stage("accuracy", 3, "internal error", "accuracy.xml"),
        stage("graph", 1, "nothing failed in its file", "graph.xml"),
        stage("doctor", 1, "", "doctor.zip"),
    ]
    inputs.run = {"stages": found}
    assert [claim.status for claim in stages.claims(inputs)] == [Status.PASS] * 2 + [Status.FAIL] * 3
