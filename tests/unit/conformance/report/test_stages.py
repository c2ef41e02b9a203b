"""Claims of the nightly run's own stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2_npu.conformance.report import stages
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.inputs import Inputs


def stage(name: str, status: int | None, problem: str = "") -> dict[str, Any]:
    return {"name": name, "command": "pytest", "status": status, "seconds": 3.0, "problem": problem}


def test_status_of_every_stage() -> None:
    run = {"stages": [stage("a", 0), stage("b", 2, "see logs/b.log"), stage("c", None)]}
    good, bad, later = stages.claims(Inputs(Path(), run=run))
    assert [claim.status for claim in (good, bad, later)] == [Status.PASS, Status.FAIL, Status.NOT_RUN]
    assert (bad.id, bad.message, bad.reference) == ("stages/b", "see logs/b.log", "exit status 2, 3 s: pytest")


def test_no_run_no_stages() -> None:
    assert stages.claims(Inputs(Path())) == []
