"""A nightly run removes what nightly runs made, and nothing else; one run at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qwen2_npu.conformance.report.own_files import LOCK, RECORD, locked, rewritten

NAMES = ("run.json", "index.html", "perf.xml", "logs/perf.log")


def night(folder: Path, *names: str, killed: bool = False) -> None:
    """A run that makes ``names``."""
    with locked(folder) as own:
        own.start(NAMES)
        for name in names:
            (folder / name).write_text("made", encoding="utf-8")
        if not killed:
            own.finish()


def refused(folder: Path, *foreign: str) -> None:
    """No run is begun, and all files stay."""
    before = {path: path.lstat() for path in folder.rglob("*") if path.name not in (RECORD, LOCK)}
    with pytest.raises(ValueError, match="no nightly run made, or that were changed since: ") as error:
        night(folder)
    assert f": {', '.join(foreign)}; this run would overwrite them" in str(error.value)
    assert "\n" not in str(error.value)
    after = {path: path.lstat() for path in folder.rglob("*") if path.name not in (RECORD, LOCK)}
    assert {path: state.st_mtime_ns for path, state in after.items()} == {
        path: state.st_mtime_ns for path, state in before.items()
    }


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_run_made_is_removed_by_the_next(tmp_path: Path, killed: bool) -> None:
    night(tmp_path, *NAMES, killed=killed)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    night(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "logs", RECORD, LOCK}
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ["pom.xml", "verify-x.json", "benchmark-x.json", "bench.json", "predictions.json"])
def test_a_file_that_the_report_would_read(tmp_path: Path, name: str, earlier: bool) -> None:
    if earlier:
        night(tmp_path, *NAMES)
    (tmp_path / name).write_text("mine", encoding="utf-8")
    refused(tmp_path, name)


def test_a_file_that_was_changed_since(tmp_path: Path) -> None:
    night(tmp_path, *NAMES)
    (tmp_path / "index.html").write_text("my page", encoding="utf-8")
    refused(tmp_path, "index.html")


@pytest.mark.parametrize("name", ["index.html", "perf.xml"])
def test_a_file_that_a_command_of_this_project_wrote_again(tmp_path: Path, name: str) -> None:
    """The documentation says to: `qwen2-npu verify` and `report` after a night."""
    night(tmp_path, *NAMES)
    (tmp_path / name).write_text("written again", encoding="utf-8")
    rewritten(tmp_path / name)
    night(tmp_path)
    assert not (tmp_path / name).exists()


def test_a_file_of_the_user_is_not_made_ours_by_writing_it_again(tmp_path: Path) -> None:
    mine, other = tmp_path / "perf.xml", tmp_path / "new"
    mine.write_text("mine", encoding="utf-8")
    rewritten(mine)
    assert [path.name for path in tmp_path.iterdir()] == ["perf.xml"], "no record where there was no run"
    mine.unlink()
    night(tmp_path, "run.json")
    mine.write_text("mine", encoding="utf-8")
    rewritten(mine)
    refused(tmp_path, "perf.xml")
    rewritten(other / "run.json")
    assert not other.exists()


def test_a_link_in_the_place_of_a_file_is_not_renewed(tmp_path: Path) -> None:
    folder, mine = tmp_path / "report", tmp_path / "mine"
    mine.write_text("mine", encoding="utf-8")
    night(folder, *NAMES)
    (folder / "perf.xml").unlink()
    (folder / "perf.xml").symlink_to(mine)
    rewritten(folder / "perf.xml")
    refused(folder, "perf.xml")
    (folder / "perf.xml").unlink()
    (folder / "perf.xml").write_text("mine", encoding="utf-8")
    refused(folder, "perf.xml")


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"perf.xml": 3}}'])
def test_writing_again_beside_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text, encoding="utf-8")
    (tmp_path / "perf.xml").write_text("mine", encoding="utf-8")
    rewritten(tmp_path / "perf.xml")


def test_writing_again_while_a_run_is_at_work(tmp_path: Path) -> None:
    """Its stages do: the record is the run's to write."""
    with locked(tmp_path) as own:
        own.start(NAMES)
        (tmp_path / "perf.xml").write_text("made", encoding="utf-8")
        before = (tmp_path / RECORD).read_bytes()
        rewritten(tmp_path / "perf.xml")
        assert (tmp_path / RECORD).read_bytes() == before
        own.finish()
        before = (tmp_path / RECORD).read_bytes()
        rewritten(tmp_path / "perf.xml")
        assert (tmp_path / RECORD).read_bytes() == before, "another run has it"


def test_a_name_that_the_last_run_did_not_make(tmp_path: Path) -> None:
    night(tmp_path, "run.json")
    (tmp_path / "perf.xml").write_text("mine", encoding="utf-8")
    refused(tmp_path, "perf.xml")


def test_links_are_never_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "report", tmp_path / "outside"
    night(folder, *NAMES)
    outside.mkdir()
    for name in ("perf.xml", "perf.log"):
        (outside / name).write_text("made", encoding="utf-8")
    (folder / "perf.xml").unlink()
    (folder / "perf.xml").symlink_to(outside / "perf.xml")
    refused(folder, "perf.xml")
    (folder / "perf.xml").unlink()
    (folder / "logs" / "perf.log").unlink()
    (folder / "logs").rmdir()
    (folder / "logs").symlink_to(outside)
    with pytest.raises(ValueError, match=rf"^{folder}/logs is not a folder of its own"):
        night(folder)
    assert len(list(outside.iterdir())) == 2


def test_a_record_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "sub").mkdir(parents=True)
    names = {str(tmp_path / "a"): None, "../b": None, "sub/c": None, "..": None, "logs/../sub/d": None}
    (folder / RECORD).write_text(json.dumps({"files": names}), encoding="utf-8")
    mine = [tmp_path / "a", tmp_path / "b", folder / "sub" / "c", folder / "sub" / "d"]
    for path in mine:
        path.write_text("mine", encoding="utf-8")
    night(folder)
    assert all(path.exists() for path in mine)


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', "\xff"])
def test_a_damaged_record_makes_nothing_its_own(tmp_path: Path, text: str) -> None:
    night(tmp_path, *NAMES)
    (tmp_path / RECORD).write_text(text, encoding="latin-1")
    refused(tmp_path, *sorted(NAMES))


def test_many_files_are_counted(tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}.xml").touch()
    refused(tmp_path, "0.xml", "1.xml", "2.xml", "3.xml", "4.xml and 4 more")


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    with locked(tmp_path) as own:
        own.start(NAMES)
        (tmp_path / "perf.xml").write_text("made", encoding="utf-8")
        message = rf"^another nightly run \(process {os.getpid()}\) writes into {tmp_path}: wait for its end"
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
        assert (tmp_path / "perf.xml").exists()
    night(tmp_path)


def test_a_lock_that_is_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / LOCK).symlink_to(mine)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{LOCK} is a link"), locked(tmp_path):
        pass
    assert mine.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path: Path, there: bool) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can take another user's place")
    folder = tmp_path / "report"
    if there:
        folder.mkdir(mode=0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as error, locked(folder):
            pass
    finally:
        os.seteuid(0)
    assert str(folder) in str(error.value)
    assert "cannot be written (Permission denied): change the permissions of its folder, or" in str(error.value)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "report").touch()
    with pytest.raises(OSError, match=r"report cannot be written \(File exists\)"), locked(tmp_path / "report"):
        pass
