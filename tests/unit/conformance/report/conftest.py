"""One eventful SYNTHETIC run with its history, made once, and its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.report import history
from qwen2_npu.conformance.report.changes import Change, changes
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.page import render
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.synthetic import eventful


class Made(NamedTuple):
    folder: Path
    results: Results
    history: Sequence[Run]
    changes: list[Change]

    def change(self, id: str) -> Change:
        (found,) = (change for change in self.changes if change.claim.id == id)
        return found


@pytest.fixture(scope="package")
def night(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("synthetic")
    for number in range(11):
        eventful(number).remember(folder / "history")
    eventful(11).write(folder)
    predicted = [{"row_id": number.row.id, "predicted_ms": number.ms * 1.1} for number in documented.read()]
    (folder / "predictions.json").write_text(json.dumps(predicted), encoding="utf-8")
    results = Results.of(folder)
    runs, problems = history.load(folder / "history")
    assert not problems
    return Made(folder, results, runs, changes(results.claims, Run.of(results), runs))


@pytest.fixture(scope="package")
def page(night: Made) -> str:
    return render(night.results, night.history)
