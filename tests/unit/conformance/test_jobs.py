"""One rank's side of a job; who asks is tested with the runner of latency rows, both together in tests/perf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance import jobs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.argv", ["module", "--local_rank=0", str(tmp_path)])
    (tmp_path / jobs.REQUEST).write_text(json.dumps({"device": "cpu", "number": 3}))
    return tmp_path


def test_rank_0_leaves_the_answer(folder: Path) -> None:
    assert jobs.answer(lambda request, group: {"twice": 2 * request["number"], "on": str(group.device)}) == 0
    assert json.loads((folder / jobs.RESULT).read_text()) == {"twice": 6, "on": "cpu"}


@pytest.mark.parametrize(("said", "line"), [("two\n lines", "error: two lines"), ("", "error: ValueError")])
def test_what_goes_wrong_is_one_line_and_no_answer(
    said: str, line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(request: Any, group: Any) -> Any:
        raise ValueError(said)

    assert jobs.answer(work) == 1
    assert not (folder / jobs.RESULT).exists()
    errors = capsys.readouterr().err.splitlines()
    assert [each for each in errors if each.startswith("error: ")] == [line]
