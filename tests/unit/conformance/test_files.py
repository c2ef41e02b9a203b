import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen2_npu.conformance.files import check_folder, check_writable, read_json, write_json, write_text
from qwen2_npu.conformance.machine.bug_report import bundle
from tests.unit.emulator.users import OTHER, USER, as_root, as_user, owned


@pytest.fixture
def everyone() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own belong to one."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


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


@as_root
def test_a_folder_for_files_that_come_later(everyone: Path) -> None:
    check_folder(everyone / "new" / "history")
    assert list((everyone / "new" / "history").iterdir()) == []
    answer = as_user(USER, lambda: check_folder(everyone / "new" / "history"))
    assert answer.error == (
        f"{everyone}/new/history cannot be written (Permission denied): change the permissions of its folder, or name "
        "another place"
    )


# ---- errors of the system: real users, real limits ------------------------------------------------------------------
Write = Callable[[Path], object]
WRITERS: tuple[Write, ...] = (
    check_writable,
    lambda path: write_text(path, "new"),
    lambda path: write_json(path, {}),
    lambda path: bundle.write(path, "cpu", "findings", parts=[]),
)
"""Each has to name the file in its errors."""


@as_root
@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_of_another_user_is_named(write: Write, everyone: Path) -> None:
    path = owned(everyone / "theirs", USER, 0o755) / "report.json"
    answer = as_user(OTHER, lambda: write(path))
    assert answer.kind == "PermissionError"
    assert answer.error == (
        f"{path} cannot be written (Permission denied): change the permissions of its folder, or name another place"
    )


@as_root
@pytest.mark.parametrize("write", WRITERS)
def test_a_file_of_another_user_where_only_its_owner_may_replace_it(write: Write, everyone: Path) -> None:
    folder = owned(everyone / "shared", USER, 0o1777)
    path = owned(folder / "report.json", USER, 0o644, "old")
    answer = as_user(OTHER, lambda: write(path))
    assert answer.error == (
        f"{path} cannot be written (the file of that name belongs to another user): name another place"
    )
    assert path.read_text() == "old"
    assert as_user(USER, lambda: write(path)).error == ""


@as_root
@pytest.mark.parametrize("write", WRITERS[1:])
def test_a_write_that_stops_half_way_leaves_the_old_file(write: Write, everyone: Path) -> None:
    folder = owned(everyone / "mine", USER, 0o755)
    path = owned(folder / "report.json", USER, 0o644, "old")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
        write(path)

    answer = as_user(USER, limited)
    assert answer.error.startswith(f"{path} cannot be written (File too large): ")
    assert (path.read_text(), os.listdir(folder)) == ("old", ["report.json"])


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"/a cannot be written \(No space left on device\): free space on its disk, or"):
        write_text(tmp_path / "a", "text")


@pytest.mark.parametrize("write", WRITERS)
def test_pipes_and_devices_are_refused_and_kept(write: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe is a device or a pipe: name a regular file"):
        write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match=r"is a folder: name a file in it"):
        write(tmp_path)
    with pytest.raises(OSError, match=r"cannot be written \(File name too long\): choose a shorter name, or"):
        write(tmp_path / ("x" * 300))


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": "\ud800"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "\ud800"}


# ---- reading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\x00\xff", r"not UTF-8 text \(byte 1\)"),
        ("{}".encode("utf-16"), "not UTF-8 text"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[NaN]", "it holds NaN, which is not valid JSON"),
        (b"[-Infinity]", "it holds -Infinity"),
        (b'["\\ud800"]', "not Unicode text"),
        (b'[{"\\udc00x": 1}]', "not Unicode text"),
    ],
)
def test_what_is_wrong_with_a_json_file(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_a_mark_of_the_byte_order_is_no_fault_and_a_pipe_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "b.json")
