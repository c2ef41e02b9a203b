"""One eventful SYNTHETIC run with its history, made once, and its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.report import figures, history
from qwen2_npu.conformance.report.changes import Change, changes
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.page import render
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.synthetic import eventful


def drawn_once(chart: Callable[..., str]) -> Callable[..., str]:
    drawn: dict[str, str] = {}

    def draw(*arguments: object) -> str:
        key = repr(arguments)
        if key not in drawn:
            drawn[key] = chart(*arguments)
        return drawn[key]

    return draw


@pytest.fixture(scope="package", autouse=True)
def _charts_drawn_once() -> Iterator[None]:
    """Most pages show the same documented numbers, whose charts take most of the time of a page."""
    charts = ((figures, "ladder"), (figures, "sweep"), (figures.kernels, "kernels"), (figures.roofline, "roofline"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in charts:
            patch.setattr(module, name, drawn_once(getattr(module, name)))
        yield


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
    predicted = [
        {"row_id": number.row.id, "low_ms": number.ms * 1.05, "high_ms": number.ms * 1.1}
        for number in documented.read()
    ]
    (folder / "predictions.json").write_text(json.dumps(predicted), encoding="utf-8")
    results = Results.of(folder)
    runs, problems = history.load(folder / "history")
    assert not problems
    return Made(folder, results, runs, changes(results.claims, Run.of(results), runs))


@pytest.fixture(scope="package")
def page(night: Made) -> str:
    return render(night.results, night.history)
