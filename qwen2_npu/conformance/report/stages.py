"""Claims of the run itself: every stage of `qwen2-npu nightly` ran to its end."""

from __future__ import annotations

from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import Inputs

AREA = "Stages of the run"


def claims(inputs: Inputs) -> list[Claim]:
    """One per stage; none where the files were made one by one."""
    return [
        Claim(
            id=f"stages/{stage['name']}",
            area=AREA,
            title=f"{stage['name']}: {stage['command']}",
            status=_status(stage["status"]),
            verified=inputs.run.get("provenance", {}).get("verified") or "",
            reference="" if stage["status"] is None else f"{stage['seconds']:.0f} s, exit status {stage['status']}",
            message=stage.get("problem", ""),
        )
        for stage in inputs.run.get("stages", [])
    ]


def _status(status: int | None) -> Status:
    """None: its turn did not come."""
    return Status.NOT_RUN if status is None else Status.PASS if status == 0 else Status.FAIL
