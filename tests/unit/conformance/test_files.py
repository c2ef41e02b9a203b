import json
import os
from pathlib import Path

import pytest

from qwen2_npu.conformance.files import check_writable, write_json


def test_numbers_without_a_name_in_json_become_strings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"a": [1.5, float("nan")], "b": (float("inf"),), 3: "三"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1.5, "nan"], "b": ["inf"], "3": "三"}


def test_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_place_that_cannot_be_written_is_found_out_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"is a folder: name a file in it"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=r"file/report\.json cannot be written \(.*\): name another place"):
        check_writable(tmp_path / "file" / "report.json")
    check_writable(tmp_path / "new" / "report.json")
    assert list((tmp_path / "new").iterdir()) == []
