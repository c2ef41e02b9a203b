"""Runs are remembered whole, or not at all."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2_npu.conformance.report import history
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.results import Results
from tests.unit.conformance.report.synthetic import SLOW, Night, commit_of, write_junit


def results(folder: Path, night: Night) -> Results:
    return Results.of(night.write(folder))


def test_there_and_back(tmp_path: Path) -> None:
    found = results(tmp_path / "a", Night(0, slower={SLOW: 1.2}))
    path = history.append(tmp_path / "history", found)
    assert path.name == f"20261001T020000-{commit_of(0)[:12]}-{found.provenance.fingerprint.digest}.json"
    (run,), problems = history.load(tmp_path / "history")
    assert problems == []
    assert run == Run.of(found)
    assert run.entries[f"latency/{SLOW}"].status is Status.FAIL
    assert not any("72b" in id for id in run.entries), "what was not run is not remembered"


def test_twice_is_once_and_oldest_first(tmp_path: Path) -> None:
    for number in (3, 0, 3):
        history.append(tmp_path / "history", results(tmp_path / f"n{number}", Night(number)))
    runs, _ = history.load(tmp_path / "history")
    assert [run.provenance.commit for run in runs] == [commit_of(0), commit_of(3)]


def test_a_commit_that_is_a_path_stays_in_the_folder() -> None:
    for commit in ("../../../../etc/x", "/etc/x", "a\x00b", ".."):
        name = Run(replace(Night(0).provenance, commit=commit), {}).name
        assert re.fullmatch(r"20261001T020000-\w+-\w+", name), name


def test_a_self_test_stays_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not added to the history: its latencies were injected"):
        history.append(tmp_path / "history", results(tmp_path / "a", Night(0, self_test=True)))
    assert not (tmp_path / "history").exists()


def test_an_unknown_commit_stays_out(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(json.dumps(Night(0).verification()), encoding="utf-8")
    with pytest.raises(ValueError, match="no file of this run states its commit"):
        history.append(tmp_path / "history", Results.of(tmp_path))


def test_two_commits_stay_out(tmp_path: Path) -> None:
    write_junit(Night(0).write(tmp_path) / "graph.xml", [], Night(3).provenance)
    with pytest.raises(ValueError, match=r"graph\.xml is of commit"):
        history.append(tmp_path / "history", Results.of(tmp_path))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(tmp_path / "a", Night(0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        history.append(tmp_path / "history", found)
    assert list((tmp_path / "history").iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"schema": 1, "claims": {"a": 3}, "provenance": {}}'])
def test_a_file_that_cannot_be_read_is_said(text: str, tmp_path: Path) -> None:
    history.append(tmp_path, results(tmp_path / "a", Night(0)))
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    runs, (problem,) = history.load(tmp_path)
    assert len(runs) == 1
    assert problem.startswith("history: broken.json cannot be read")
