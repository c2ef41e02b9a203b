"""Claims of the run itself: every stage of `qwen2-npu nightly` ran to its end."""

from __future__ import annotations

from typing import Any

from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import Inputs

AREA = "Stages of the run"


def claims(inputs: Inputs) -> list[Claim]:
    """One per stage; none where the files were made one by one."""
    return [
        Claim(
            id=f"stages/{stage['name']}",
            area=AREA,
            title=f"stage {stage['name']} ran to its end",
            status=_status(stage["status"]),
            verified=inputs.run.get("provenance", {}).get("verified") or "",
            reference=_facts(stage),
            message=stage.get("problem", ""),
        )
        for stage in inputs.run.get("stages", [])
    ]


def _facts(stage: dict[str, Any]) -> str:
    ended = "" if stage["status"] is None else f"exit status {stage['status']}, {stage['seconds']:.0f} s: "
    return f"{ended}{stage['command']}"


def _status(status: int | None) -> Status:
    """None: its turn did not come."""
    return Status.NOT_RUN if status is None else Status.PASS if status == 0 else Status.FAIL
