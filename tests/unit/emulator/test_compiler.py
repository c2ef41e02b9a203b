"""CC as users write it, and compilers that fail in their own ways."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from qwen2_npu.emulator import compiler
from qwen2_npu.emulator.settings import EmulatorError

RECORD = 'printf "%s\\n" "$@" > "$0.arguments"\nenv > "$0.environment"\ncat > "$0.stdin"\n'
WRITE = 'for output; do :; done; : > "$output"\n'


def program(path: Path, body: str, first: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(first + body)
    path.chmod(0o755)
    return path


def run(words: list[str], folder: Path) -> None:
    compiler.shared_library(words, ["a.c"], folder / "lib.so", ["-lm"])


def failure(tmp_path: Path, body: str, first: str = "#!/bin/sh\n") -> str:
    with pytest.raises(EmulatorError) as caught:
        run([str(program(tmp_path / "cc", body, first))], tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ("{0}", ["{0}"]),
        ("{0} -O3 -DNAME", ["{0}", "-O3", "-DNAME"]),
        ("{0} gcc -m64", ["{0}", "gcc", "-m64"]),
        ("  {0}   -g ", ["{0}", "-g"]),
        ("{0} '-DTEXT=two words'", ["{0}", "-DTEXT=two words"]),
        ("'{1}' -g", ["{1}", "-g"]),
    ],
)
def test_cc_is_read_as_a_shell_would(tmp_path, monkeypatch, written, understood):
    paths = [str(program(tmp_path / "cc", "")), str(program(tmp_path / "a folder" / "cc", ""))]
    monkeypatch.setenv("CC", written.format(*paths))
    assert compiler.command() == [word.format(*paths) for word in understood]


def test_cc_by_name(tmp_path, monkeypatch):
    path = program(tmp_path / "my-ccache", "")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CC", "my-ccache gcc")
    assert compiler.command() == [str(path), "gcc"]


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize(
    ("own", "understood"),
    [("my-cc -pthread -B /built/there", ["my-cc"]), ("my-ccache my-cc -g", ["my-ccache", "my-cc"]), (None, ["cc"])],
)
def test_python_s_own_compiler_where_cc_is_not_set(tmp_path, monkeypatch, text, own, understood):
    for name in ("my-cc", "my-ccache", "cc"):
        program(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", text)
    monkeypatch.setattr(compiler.sysconfig, "get_config_var", {"CC": own}.get)
    assert compiler.command() == [str(tmp_path / understood[0]), *understood[1:]]


def test_a_usual_name_where_python_s_own_compiler_is_not_here(tmp_path, monkeypatch):
    program(tmp_path / "clang", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler.sysconfig, "get_config_var", {"CC": "theirs -m64"}.get)
    assert compiler.command() == [str(tmp_path / "clang")]
    (tmp_path / "clang").unlink()
    with pytest.raises(EmulatorError, match=r"^no C compiler \(theirs, cc, gcc, clang\): .*apt-get install gcc"):
        compiler.command()


@pytest.mark.parametrize("text", ['gcc "-O2', "gcc '", "gcc \\"])
def test_a_cc_that_cannot_be_read(monkeypatch, text):
    monkeypatch.setenv("CC", text)
    with pytest.raises(EmulatorError, match=r"^CC=.*gcc.* cannot be read \(No .*\): write it as for a shell"):
        compiler.command()


@pytest.mark.parametrize("text", ["no-such-cc", "no-such-cc -O2", "''", "-O2", "/"])
def test_a_cc_that_is_not_here(monkeypatch, text):
    monkeypatch.setenv("CC", text)
    with pytest.raises(EmulatorError, match=r"^no C compiler \((no-such-cc|-O2|/|)\): .*or name one in CC$"):
        compiler.command()


def test_how_the_compiler_is_called(tmp_path, monkeypatch):
    path = program(tmp_path / "cc", RECORD + WRITE)
    run([str(path), "-DNAME"], tmp_path)
    words = Path(f"{path}.arguments").read_text().splitlines()
    output = str(tmp_path / "lib.so")
    expected = ["-DNAME", "-std=gnu11", "-O2", "-fPIC", "-shared", "-Wl,-soname,lib.so", "a.c", "-lm", "-o", output]
    assert words == expected
    # Its temporary files fill no other disk, and its messages are not translated.
    assert {f"TMPDIR={tmp_path}", "LC_ALL=C"} <= set(Path(f"{path}.environment").read_text().splitlines())
    assert Path(f"{path}.stdin").read_text() == ""


@pytest.mark.parametrize("level", ["-O0", "-O", "-Os"])
def test_a_level_of_optimisation_in_cc_is_the_level(tmp_path, level):
    path = program(tmp_path / "cc", RECORD + WRITE)
    run([str(path), level], tmp_path)
    words = Path(f"{path}.arguments").read_text().splitlines()
    assert [word for word in words if word.startswith("-O")] == [level]


def test_a_compiler_that_fails_is_quoted(tmp_path):
    text = failure(tmp_path, "printf 'a.c:1: \\377 is wrong\\n' >&2; exit 1\n")
    assert text.startswith("the C compiler cannot build the emulator's libraries: repair it, or name another one in CC")
    assert f"{tmp_path}/cc -std=gnu11" in text
    assert text.endswith("failed:\na.c:1: � is wrong")


@pytest.mark.parametrize("status", [0, 3])
def test_a_compiler_that_writes_and_says_nothing(tmp_path, status):
    assert failure(tmp_path, f"exit {status}\n").endswith(f"failed with exit status {status} and no message")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 1])
def test_a_compiler_that_is_killed(tmp_path, number):
    text = failure(tmp_path, f"kill -{int(number)} $$\n")
    name = number.name if isinstance(number, signal.Signals) else f"signal {number}"
    assert text.startswith(f"the C compiler was killed by {name}, as happens where memory is short: free some")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("first", "reason"), [("\x7fELF", "Exec format error"), ("#!/no/such/shell\n", "No such file or directory")]
)
def test_a_compiler_that_cannot_be_run(tmp_path, first, reason):
    assert failure(tmp_path, "", first) == (
        f"the C compiler {tmp_path / 'cc'} cannot be run ({reason}): repair it, or name another one in CC"
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_folder_s_fault(tmp_path, code):
    body = f"echo 'a.c: note' >&2; echo 'ld: final link failed: {os.strerror(code)}' >&2; exit 1\n"
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        run([str(program(tmp_path / "cc", body))], tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert caught.value.strerror == f"ld: final link failed: {os.strerror(code)}"
