"""A whole run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2_npu.conformance.report import history
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.page import render
from qwen2_npu.conformance.report.results import Results
from qwen2_npu.conformance.report.summary import markdown, text
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


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "name", ["run.json", "verify.json", "benchmark.json", "bench.json", "predictions.json", "a.xml"]
)
@pytest.mark.parametrize(
    "data", [NESTED.encode(), b"[NaN]", b'{"a": Infinity}', "{}".encode("utf-16"), b"\xff\xfe\x00", b"", b"7", b"null"]
)
def test_a_file_that_holds_something_else_is_a_problem(name: str, data: bytes, tmp_path: Path) -> None:
    (Night(0).write(tmp_path) / name).write_bytes(data)
    results = Results.of(tmp_path)
    (problem,) = results.problems
    assert problem.startswith(f"{name} cannot be read: "), problem
    assert "Errno" not in problem


@pytest.mark.parametrize("name", ["verify.json", "a.xml"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_a_problem(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / f"verify-{name}.json").mkdir()
    assert set(Results.of(tmp_path).problems) == {
        f"{name} cannot be read: it is not a regular file" for name in (name, f"verify-{name}.json")
    }


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("verify.json", ("created",), 3),
        ("verify.json", ("environment", "verified"), None),
        ("verify.json", ("rows", 0, "excused"), 10**30),
        ("verify.json", ("rows", 0, "positions"), "many"),
        ("verify.json", ("rows", 0, "explanation"), 5),
        ("verify.json", ("model",), "\ud800"),
        ("benchmark.json", ("benchmarks", 0, "extra_info"), "nan"),
        ("benchmark.json", ("benchmarks", 0, "extra_info", "mean_ms"), "nan"),
        ("benchmark.json", ("benchmarks", 0, "extra_info", "mean_ms"), 1e308),
        ("benchmark.json", ("commit_info", "id"), 7),
        ("benchmark.json", ("machine_info", "qwen2_npu", "identity", "verified"), [1]),
        ("run.json", ("provenance", "created"), 3),
        ("run.json", ("provenance", "dirty"), "yes"),
        ("predictions.json", (0, "low_ms"), "nan"),
        ("predictions.json", (0, "high_ms"), 1e400),
    ],
)
def test_a_value_of_the_wrong_type_is_a_problem_of_its_file(
    name: str, path: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    folder = Night(0).write(tmp_path)
    (folder / "predictions.json").write_text('[{"row_id": "a", "low_ms": 1, "high_ms": 2}]', encoding="utf-8")
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    results = Results.of(folder)
    (problem,) = results.problems
    assert problem.startswith(f"{name} cannot be read: "), problem
    assert f"- ✗ {text(problem)}\n" in markdown(results, [])


def test_numbers_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    """As `qwen2-npu verify` writes them; the history holds them too."""
    for number in range(3):
        folder = replace(Night(number), wrong_steps=frozenset({"swiglu"})).write(tmp_path / f"{number}")
        content = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
        content["rows"][-1]["rms_ratio"] = "nan"
        content["rows"][0]["rms_ratio"] = "inf"
        (folder / "verify.json").write_text(json.dumps(content), encoding="utf-8")
        results = Results.of(folder)
        runs, problems = history.load(tmp_path / "history")
        assert (problems, results.problems) == ([], ())
        history.append(tmp_path / "history", results)
    assert "nan × noise" in render(results, runs)
