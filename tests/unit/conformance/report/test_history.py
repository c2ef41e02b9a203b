"""Runs are remembered whole, or not at all."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report import history
from qwen2_npu.conformance.report.claims import Claim, Status, Value
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


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("value", [None, Value(1.7, "times as fast", lower_is_better=False)], ids=["none", "ratio"])
def test_all_that_is_known_of_a_claim_is_remembered(status: Status, value: Value | None, tmp_path: Path) -> None:
    found = results(tmp_path / "a", Night(0))
    one = Claim("x", "X", "x", status, subject="s", verified=Verified.read("cuda (x)"), value=value)
    run = Run.of(replace(found, claims=(*found.claims, one)))
    entry = Run.from_json(json.loads(json.dumps(run.to_json()))).entries.get("x")
    assert entry == (None if status is Status.NOT_RUN else history.Entry(status, one.verified, "s", value))


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


# ---- several processes, and processes that are killed ---------------------------------------------------------------
def forked(work: Callable[[], object]) -> int:
    """The id of a child that does ``work``; its status is 0 where that raised nothing."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    found = results(tmp_path / "a", Night(0))
    folder, expected = tmp_path / "history", []
    for number in range(8):
        other = replace(found, provenance=Night(number % 4).provenance)  # two of each
        expected.append(Run.of(other))

    def append_often(index: int) -> None:
        for _ in range(5):
            history.append(folder, replace(found, provenance=Night(index % 4).provenance))

    children = [forked(partial(append_often, index)) for index in range(8)]
    while any(os.waitpid(child, os.WNOHANG)[0] == 0 for child in children[-1:]):
        assert history.load(folder)[1] == [], "a reader saw half a file"
    assert [os.waitpid(child, 0)[1] for child in children[:-1]] == [0] * 7
    runs, problems = history.load(folder)
    assert (runs, problems) == (expected[:4], [])


@pytest.mark.slow
def test_a_killed_append_leaves_the_old_run_or_the_new_one(tmp_path: Path) -> None:
    """Killed after every call of the system that writing consists of."""
    found = results(tmp_path / "a", Night(0))
    folder = tmp_path / "history"
    old = Run.of(replace(found, claims=found.claims[:50]))
    for name in ("mkstemp", "write_bytes", "fsync", "chmod", "replace", "close"):
        for when in ("before", "after"):
            write_json(folder / f"{old.name}.json", old.to_json())

            def killed(name: str = name, when: str = when) -> None:
                owner = next(part for part in (tempfile, os, Path) if name in vars(part) and (name, part) != PATHLIB)
                real = getattr(owner, name)

                def call(*arguments: Any, **more: Any) -> Any:
                    if when == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                    made = real(*arguments, **more)
                    os.kill(os.getpid(), signal.SIGKILL)
                    return made

                setattr(owner, name, call)
                history.append(folder, found)

            status = os.waitpid(forked(killed), 0)[1]
            assert os.WTERMSIG(status) == signal.SIGKILL, name
            (run,), problems = history.load(folder)
            assert problems == []
            assert run == (Run.of(found) if (name, when) in AFTER else old), (name, when)


PATHLIB = ("replace", Path)
AFTER = {("replace", "after"), ("close", "before"), ("close", "after")}
"""Where the new run is in place already."""


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": {"created": 3}}, {"provenance": {"commit": [1]}}, {"provenance": {"identity": "x"}},
        {"provenance": {"identity": {"soc": "\ud800"}}}, {"claims": {"a": {"status": "?"}}},
        {"claims": {"a": {"status": "pass", "verified": 1, "subject": "", "value": None}}},
        {"claims": {"a": {"status": "pass", "verified": "", "subject": "", "value": ["x", "ms", True]}}},
        {"claims": {"a": {"status": "pass", "verified": "", "subject": "", "value": [1, 2, True]}}},
    ],
)  # fmt: skip
def test_a_file_with_values_of_the_wrong_type_is_said(change: dict[str, Any], tmp_path: Path) -> None:
    path = history.append(tmp_path, results(tmp_path / "a", Night(0)))
    content = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "broken.json").write_text(json.dumps({**content, **change}), encoding="utf-8")
    runs, (problem,) = history.load(tmp_path)
    assert len(runs) == 1
    assert problem.startswith("history: broken.json cannot be read (")
