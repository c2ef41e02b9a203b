"""The models of rows on several cards: the one place that tensor parallelism fills in, for the latency suite.

Everything around it is there: ``launcher`` starts the ranks, ``worker`` meets them, calls :func:`build` and measures.
Imports no torch.
"""

from __future__ import annotations

from typing import Any

from qwen2_npu.conformance.perf.job import Job
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.errors import UnsupportedError


def why_not(configuration: Configuration) -> str | None:
    """Why :func:`build` would refuse; None where it builds. Asked before any process is started."""
    if configuration.cards == 1:
        return None
    return f"needs tensor parallel: {configuration.model} runs on {configuration.cards} cards"


def build(job: Job, device: str) -> Any:
    """This rank's part of the job's model, on ``device``, compiled for graph rows. The ranks have met.

    Raises:
        UnsupportedError: as :func:`why_not` says.
    """
    raise UnsupportedError(str(why_not(job.configuration)))
