"""`qwen2-npu report` as a user meets it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen2_npu.cli import main
from qwen2_npu.cli import report as cli_report
from qwen2_npu.conformance import report
from qwen2_npu.conformance.report import own_files
from qwen2_npu.conformance.report.history import load
from qwen2_npu.emulator.settings import VARIABLE
from tests.unit.conformance.report.synthetic import SLOW, Night, commit_of
from tests.unit.emulator.users import OTHER, USER, as_root, as_user, owned

assert cli_report.command.name == "report"

PAGE = "<!DOCTYPE html><title>qwen2-npu: a page</title>"


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page itself has tests of its own."""
    monkeypatch.setattr("qwen2_npu.conformance.report.page.render", lambda *arguments: PAGE)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_page_history_and_summary(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    result = run("--results", tmp_path, "--append", "--summary", tmp_path / "s.md")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Nothing failed; ")
    assert (tmp_path / "index.html").exists()
    assert (tmp_path / "s.md").read_text(encoding="utf-8").startswith("## Nothing failed")
    assert len(list((tmp_path / "history").iterdir())) == 1


def test_check_fails_where_a_run_of_the_history_cannot_be_read(tmp_path: Path) -> None:
    """What it would have told is not known."""
    Night(0).write(tmp_path)
    assert run("--results", tmp_path, "--append", "--check").exit_code == 0
    (tmp_path / "history" / "broken.json").touch()
    assert run("--results", tmp_path, "--check").exit_code == 1


@pytest.mark.parametrize("content", [b"<title>my site</title>", b"", b"\xff\xfe"])
def test_a_page_of_somebody_else_is_not_overwritten(content: bytes, tmp_path: Path) -> None:
    """The user named the folder, not the file."""
    theirs = tmp_path / "index.html"
    theirs.write_bytes(content)
    result = run("--results", tmp_path)
    assert (result.exit_code, result.output) == (
        2,
        f"error: {theirs} was not made by this command and would be lost: name a file with --output\n",
    )
    assert theirs.read_bytes() == content
    assert run("--results", tmp_path, "--output", tmp_path / "mine.html").exit_code == 0
    assert run("--results", tmp_path, "--output", theirs).exit_code == 0, "a file that is named is meant"
    assert run("--results", tmp_path).exit_code == 0, "now it is a page of this command"


def test_pages_say_early_whose_they_are() -> None:
    template = Path(report.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    assert template.index(cli_report.MARK) < cli_report.HEAD / 2


def test_a_page_of_a_night_that_is_made_again_is_still_of_that_night(tmp_path: Path) -> None:
    """Else the next night is refused: the user would have changed it."""
    names = ["index.html", "summary.md"]
    with own_files.locked(tmp_path) as own:
        own.start(names)
        for name in names:
            (tmp_path / name).write_text(PAGE, encoding="utf-8")
        own.finish()
    assert run("--results", tmp_path, "--summary", tmp_path / "summary.md").exit_code == 0
    with own_files.locked(tmp_path) as own:
        own.start(names)
    assert not any((tmp_path / name).exists() for name in names)


def test_check_fails_what_failed_and_what_is_no_longer_run(tmp_path: Path) -> None:
    first = Night(0).write(tmp_path / "0")
    assert run("--results", first, "--history", tmp_path / "h", "--append", "--check").exit_code == 0
    slow = Night(1, slower={SLOW: 1.3}).write(tmp_path / "1")
    result = run("--results", slow, "--history", tmp_path / "h", "--check")
    assert (result.exit_code, result.output.splitlines()[0]) == (
        1,
        f"1 check regressed since {commit_of(0)[:10]} (2026-10-01)",
    )
    assert run("--results", slow, "--history", tmp_path / "h").exit_code == 0
    lost = Night(2).write(tmp_path / "2")
    (lost / "graph.xml").unlink()
    result = run("--results", lost, "--history", tmp_path / "h", "--check")
    assert (result.exit_code, "passed before and were not run" in result.output) == (1, True)


def test_what_must_not_be_remembered_still_gets_its_page(tmp_path: Path) -> None:
    Night(0, self_test=True).write(tmp_path)
    result = run("--results", tmp_path, "--append")
    assert result.exit_code == 2
    assert "error: not added to the history" in result.output
    assert (tmp_path / "index.html").exists()


def test_nothing_at_all(tmp_path: Path) -> None:
    result = run("--results", tmp_path / "none", "--output", tmp_path / "page.html")
    assert (result.exit_code, result.output.splitlines()[0]) == (0, "Nothing was run")
    assert run("--results", tmp_path / "none", "--output", tmp_path / "page.html", "--check").exit_code == 1


@pytest.mark.slow
def test_the_page_is_made_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    Night(0).write(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['qwen2-npu', 'report', '--results', sys.argv[1]]; "
        "from qwen2_npu.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    # Not as a child of an emulated process, which this one may be.
    plain = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    assert "the cost model cannot be loaded here" in (tmp_path / "index.html").read_text(encoding="utf-8")


# ---- folders and files that may not be used -------------------------------------------------------------------------
@pytest.fixture
def quiet() -> Iterator[Path]:
    """A run in a folder that every user can reach, after everything is loaded that a child of another user needs."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    Night(0).write(folder / "results").chmod(0o755)
    assert run("--results", folder / "results", "--output", folder / "x" / "y", "--append").exit_code == 0
    assert run("--results", __file__).exit_code == 2, "a usage error, whose formatting is loaded"
    shutil.rmtree(folder / "x")
    yield folder
    shutil.rmtree(folder)


def errors_of(*arguments: object) -> str:
    """What another user reads."""

    def called() -> str:
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        return result.output

    answer = as_user(OTHER, called)
    assert not answer.error
    assert "Errno" not in answer.value
    return " ".join(answer.value.split())


@as_root
def test_an_unreadable_results_folder(quiet: Path) -> None:
    folder = quiet / "closed" / "results"
    folder.parent.mkdir(0o700)
    shutil.copytree(quiet / "results", folder)
    assert errors_of("--results", folder, "--output", quiet / "page.html") == (
        f"error: the results folder {folder} cannot be read (Permission denied): change its permissions, or name "
        "another with --results"
    )
    folder.parent.chmod(0o755)
    folder.chmod(0o711)
    said = errors_of("--results", folder, "--output", quiet / "page.html")
    assert f"Invalid value for '--results': Directory '{folder}' is not readable." in said


@as_root
def test_an_output_or_a_summary_that_cannot_be_written_is_found_first(quiet: Path) -> None:
    folder, open_to_all = quiet / "results", owned(quiet / "open", OTHER)
    for page, summary in ((folder / "index.html", open_to_all / "s.md"), (open_to_all / "p", folder / "s.md")):
        said = errors_of("--results", folder, "--output", page, "--summary", summary)
        named = next(path for path in (page, summary) if path.parent == folder)
        assert said.startswith(f"error: {named} cannot be written (Permission denied): change the permissions of its")
        assert list(open_to_all.iterdir()) == []


@as_root
def test_a_history_that_cannot_be_written_or_read(quiet: Path) -> None:
    folder, history = quiet / "results", owned(quiet / "history", USER, 0o755)
    page = owned(quiet / "open", OTHER) / "page.html"
    said = errors_of("--results", folder, "--output", page, "--history", history, "--append")
    assert f"error: {history}/" in said
    assert "cannot be written (Permission denied): change the permissions of its folder, or name another" in said
    assert page.exists()
    history.chmod(0o700)
    said = errors_of("--results", folder, "--output", page, "--history", history)
    assert f"Invalid value for '--history': Directory '{history}' is not readable." in said
    inner = history / "inner"
    assert as_user(OTHER, lambda: load(inner)[1]).value == str(
        [f"the history folder {inner} cannot be read (Permission denied): nothing is compared with it"]
    )


@as_root
def test_an_unreadable_file_is_a_problem_of_that_file(quiet: Path) -> None:
    folder = quiet / "results"
    (folder / "verify.json").chmod(0o600)
    (folder / "graph.xml").chmod(0o600)
    (folder / "history" / "x.json").write_text("{}")
    (folder / "history" / "x.json").chmod(0o600)
    summary = owned(quiet / "open", OTHER) / "s.md"

    def called() -> str:
        return run("--results", folder, "--output", summary.with_name("p"), "--summary", summary).output

    answer = as_user(OTHER, called)
    assert answer.value.startswith("3 problems with the files"), answer
    text = summary.read_text(encoding="utf-8")
    for line in (
        "- ✗ verify.json cannot be read: Permission denied",
        "- ✗ graph.xml cannot be read: Permission denied",
        "- ✗ history: x.json cannot be read (Permission denied): it is left out",
    ):
        assert line in text.splitlines()


def test_a_results_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    result = run("--results", tmp_path / "none", "--output", tmp_path / "page.html")
    assert (
        f"There was no folder {tmp_path / 'none'}: name the folder of the run's files with --results." in result.output
    )
    Night(0).write(tmp_path / "some")
    assert "There was no folder" not in run("--results", tmp_path / "some").output
