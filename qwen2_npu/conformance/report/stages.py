"""Claims of the run itself: every stage of `qwen2-npu nightly` ran to its end."""

from __future__ import annotations

from typing import Any

from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import RunInputs

AREA = "Stages of the run"

FOUND_FAILURES = 1
"""Exit status of pytest and `verify` that ran to their end and found something."""


def claims(inputs: RunInputs) -> list[Claim]:
    """One per stage; none where the files were made one by one."""
    return [
        Claim(
            id=f"stages/{stage['name']}",
            area=AREA,
            title=f"stage {stage['name']} ran to its end",
            status=_status(stage, inputs),
            verified=Provenance.from_json(inputs.run.get("provenance", {})).verified,
            reference=_facts(stage),
            message=stage.get("problem", ""),
        )
        for stage in inputs.run.get("stages", [])
    ]


def _facts(stage: dict[str, Any]) -> str:
    ended = "" if stage["status"] is None else f"exit status {stage['status']}, {stage['seconds']:.0f} s: "
    return f"{ended}{stage['command']}"


def _status(stage: dict[str, Any], inputs: RunInputs) -> Status:
    """None: its turn did not come. Failures that its files hold are claims of their own, not the stage's."""
    status = stage["status"]
    if status is None:
        return Status.NOT_RUN
    return Status.PASS if status == 0 or (status == FOUND_FAILURES and _holds_failures(stage, inputs)) else Status.FAIL


def _holds_failures(stage: dict[str, Any], inputs: RunInputs) -> bool:
    made = stage.get("makes", [])
    sessions = [session for session in inputs.sessions if session.path.name in made]
    verifications = [content for name, content in inputs.verifications.items() if name in made]
    return any(case.outcome == "failed" for session in sessions for case in session.cases) or any(
        not content["passed"] for content in verifications
    )
