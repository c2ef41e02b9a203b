"""A whole run."""

from __future__ import annotations

from pathlib import Path

from qwen2_npu.conformance.report.claims import Status
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


def test_files_of_another_commit_are_no_pass(tmp_path: Path) -> None:
    write_junit(Night(0).write(tmp_path) / "graph.xml", [], Night(3).provenance)
    assert not Results.of(tmp_path).passed


def test_a_self_test_says_so(tmp_path: Path) -> None:
    assert Results.of(Night(0, self_test=True).write(tmp_path)).self_test
