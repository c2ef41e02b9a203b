"""The guide's own names of the ladder's rows, beside the steps'."""

from __future__ import annotations

from functools import cache

from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.documented import BaselineError
from qwen2_npu.optimizations import EXPERTS, LADDER, ORIGINAL, PARALLEL, QUANTIZED

STEPS = (ORIGINAL, *LADDER, *EXPERTS, *PARALLEL, *QUANTIZED)
"""Rows of every table of the ladder."""


@cache
def labels() -> dict[str, str]:
    """Step -> the guide's name; steps beyond the guide have none."""
    try:
        numbers = documented.read()
    except BaselineError:  # an installed wheel has no baselines; the page says so where they are needed
        return {}
    found: dict[str, str] = {}
    for number in numbers:
        if not number.row.table.endswith("-batch"):
            # Remarks in brackets belong to one table's row, not to the step.
            found.setdefault(number.row.configuration.step, number.label.split("(")[0])
    return found
