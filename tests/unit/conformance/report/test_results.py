"""A whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.page import render
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.synthetic import Night, write_junit


def test_nothing_is_never_green(tmp_path: Path) -> None:
    results = Results.of(tmp_path)
    assert {claim.status for claim in results.claims} == {Status.NOT_RUN}
    assert not results.passed
    assert len(results.claims) > 150


def test_a_quiet_night(tmp_path: Path) -> None:
    results = Results.of(Night(0).write(tmp_path))
    assert results.passed
    assert results.problems == ()
    assert not results.self_test
    assert results.provenance == Night(0).provenance


def test_a_damaged_file_is_no_pass(tmp_path: Path) -> None:
    path = Night(0).write(tmp_path) / "accuracy.xml"
    path.write_text("<testsuites>", encoding="utf-8")
    results = Results.of(tmp_path)
    assert not results.passed
    assert "accuracy.xml" in results.problems[0]


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("run.json", {"stages": [{}]}, "run.json cannot be read: not what this version writes (it misses 'name')"),
        ("run.json", {"provenance": 4}, "run.json cannot be read: not what this version writes ('int'"),
        ("verify.json", {"model": ...}, "verify.json cannot be read: not what this version writes (it misses 'model')"),
        ("verify.json", {"rows": [{"step": "swiglu"}]}, "verify.json cannot be read: not what this version writes (it"),
        ("benchmark.json", {"benchmarks": 3}, "benchmark.json cannot be read: not what this version writes ('int'"),
        ("benchmark.json", {"benchmarks": [{"extra_info": {"row": "x", "mean_ms": 1}}]}, "it misses 'passed'"),
    ],
)
def test_json_of_the_wrong_shape_is_a_problem_and_the_rest_is_kept(name, change, fault, tmp_path: Path) -> None:
    path = Night(0).write(tmp_path) / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= change
    content = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(content), encoding="utf-8")
    results = Results.of(tmp_path)
    assert fault in results.problems[0]
    assert len(results.problems) == 1
    assert not results.passed
    assert results.counts()[Status.PASS] > 10
    assert "cannot be read" in render(results, [])


def test_files_of_another_commit_are_no_pass(tmp_path: Path) -> None:
    write_junit(Night(0).write(tmp_path) / "graph.xml", [], Night(3).provenance)
    assert not Results.of(tmp_path).passed


def test_a_self_test_says_so(tmp_path: Path) -> None:
    assert Results.of(Night(0, self_test=True).write(tmp_path)).self_test
