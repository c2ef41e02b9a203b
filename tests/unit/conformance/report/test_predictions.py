"""Predictions are of the run, of the committed model, or absent; the page is made in every case."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen2_npu.conformance.perf import cost_model, documented
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.predictions import predictions


def test_of_the_run() -> None:
    assert predictions(RunInputs(Path(), predictions={"a": (3.0, 4.0)})) == (
        {"a": (3.0, 4.0)}, "predictions.json of this run",
    )  # fmt: skip


def test_of_the_committed_model() -> None:
    found, by = predictions(RunInputs(Path()))
    assert found.keys() == {number.row.id for number in documented.read()}
    assert "cost_model.json" in by
    assert found == {made.documented.row.id: (made.low, made.high) for made in cost_model.predictions()}
    assert all(low < high for low, high in found.values()), "one number would hide what the fit cannot tell"


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwen2_npu.conformance.perf.cost_model", None)
    monkeypatch.delattr("qwen2_npu.conformance.perf.cost_model", raising=False)
    found, by = predictions(RunInputs(Path()))
    assert found == {}
    assert by.startswith("none: the cost model cannot be loaded here")
