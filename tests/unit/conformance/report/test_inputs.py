"""A run's files: found, parsed, and missed when they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.report.inputs import RunInputs
from tests.unit.conformance.report.synthetic import Night


def test_nothing() -> None:
    inputs = RunInputs.of(Path("/no/such/folder"))
    assert not any((inputs.verifications, inputs.sessions, inputs.benchmarks, inputs.run, inputs.problems))
    assert inputs.predictions is None


def test_everything(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    (tmp_path / "predictions.json").write_text('[{"row_id": "a", "low_ms": 3, "high_ms": 4}]', encoding="utf-8")
    inputs = RunInputs.of(tmp_path)
    assert list(inputs.verifications) == ["verify.json"]
    assert [session.path.name for session in inputs.sessions] == ["accuracy.xml", "graph.xml", "perf.xml"]
    assert inputs.predictions == {"a": (3.0, 4.0)}
    assert all(verified.where is Where.NPU and verified.text.startswith("npu") for _, verified in inputs.cases())
    assert inputs.problems == []


@pytest.mark.parametrize("name", ["verify.json", "accuracy.xml", "benchmark.json", "run.json", "predictions.json"])
def test_a_damaged_file_is_a_problem(name: str, tmp_path: Path) -> None:
    path = Night(0).write(tmp_path) / name
    if not path.exists():
        path.write_text("[{}", encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    (problem,) = RunInputs.of(tmp_path).problems
    assert problem.startswith(f"{name} cannot be read")


def test_another_schema_is_a_problem(tmp_path: Path) -> None:
    content = {**Night(0).verification(), "schema": 7}
    (tmp_path / "verify.json").write_text(json.dumps(content), encoding="utf-8")
    assert RunInputs.of(tmp_path).problems == [
        "verify.json cannot be read: schema 7; this version reads 1: run `qwen2-npu verify` again"
    ]
