"""One test per row of the guide's tables, and per row of a model the user names, by the guide's protocol.

    pytest tests/perf --benchmark-compare                    # on an Atlas 800I A2: every row against its table
    pytest tests/perf --gate --gate-rows='7b-*'              # fail closed, the 7B's rows alone
    pytest tests/perf --random-weights 0.5B --update-baselines="first runs"     # five times: this machine's own

A row on eight cards is measured by a job of eight processes, which DeepSpeed's launcher starts; on a machine with fewer
cards it is not run and says so, which under --gate is a failure.

Renaming this file or its test cuts every row off from its baselines; the gate says so.
"""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.perf


def test_latency(row_id: str, request: pytest.FixtureRequest, latency_gate: Any, benchmark: Any) -> None:
    latency_gate.check(request.node, row_id, benchmark)
