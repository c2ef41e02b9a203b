"""Building CANN's libraries: caches, parallel starts, killed builds, foreign wheels (here of one tiny library)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2_npu.emulator import libraries
from qwen2_npu.emulator.cache import COMPLETE
from tests.unit.emulator import users
from tests.unit.emulator.users import as_root, owned

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

ROOT = Path(libraries.__file__).parents[2]
BUILD = "from qwen2_npu.emulator import libraries; print(libraries.build())"
LOAD = "from qwen2_npu.emulator import libraries; libraries.load(); import ctypes; ctypes.CDLL({path!r}, mode=2)"

USER = "int aclrtFromTheFuture(void); int aclrtGetDeviceCount(unsigned *);\n"
USER += "int user(unsigned *n) { return aclrtFromTheFuture() + aclrtGetDeviceCount(n); }\n"


def package(folder: Path, name: str, version: str, source: str, flags: list[str]) -> Path:
    """An installed package of one library; the path of that."""
    (folder / name / "lib").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = folder / name / "lib" / f"lib{name}.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c++" if "extern" in source else "c", "-", "-o", str(path), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def site(tmp_path):
    """A folder with a torch_npu and a torch of their own versions."""
    folder = tmp_path / "site"
    package(folder, "torch_npu", "9.9.0", USER, [])
    package(folder, "torch", "9.9.1", "int torch_thing(void) { return 1; }", [])
    return folder


def quick_compiler(folder: Path) -> str:
    """The compiler, less its optimisation: that is most of a build, and no concern of these tests."""
    path = folder / "quick-cc"
    path.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


def python(code: str, site: Path, cache: Path | None, **more: str) -> subprocess.Popen[str]:
    compiler = quick_compiler(site.parent)
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "CC": compiler, **more}
    environment.pop("QWEN2_NPU_EMULATOR", None)
    if cache is not None:
        environment["QWEN2_NPU_CACHE"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out.strip(), error.strip()


def test_a_foreign_wheel_is_built_apart_and_its_functions_refuse_by_name(site, tmp_path):
    status, folder, error = finish(python(BUILD, site, tmp_path / "cache"))
    assert status == 0, error
    assert "torch_npu-9.9.0-torch-9.9.1" in folder
    path = str(site / "torch_npu" / "lib" / "libtorch_npu.so")
    code = LOAD.format(path=path) + "; n = ctypes.c_uint(); user = ctypes.CDLL(None).aclrtFromTheFuture\n"
    code += "error = ctypes.CDLL(None).aclGetRecentErrMsg; error.restype = ctypes.c_char_p; print(user(), error())"
    status, out, error = finish(python(code, site, tmp_path / "cache"))
    assert status == 0, error
    assert out.startswith("207000")
    assert "aclrtFromTheFuture is not emulated" in out


def test_two_processes_at_once_build_once(site, tmp_path):
    both = [python(BUILD, site, tmp_path / "cache") for _ in range(2)]
    results = [finish(process) for process in both]
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1] == results[1][1]
    built = Path(results[0][1])
    assert sorted(path.name for path in built.parent.iterdir() if path.is_dir()) == [built.name]


def slow_compiler(folder: Path) -> Path:
    """A compiler that first tells that it was called, and waits."""
    path = folder / "slow-cc"
    path.write_text(f'#!/bin/sh\ntouch "{folder}/started"\nsleep 30\nexec cc "$@"\n')
    path.chmod(0o755)
    return path


def test_a_killed_build_leaves_nothing_that_looks_finished(site, tmp_path):
    cache = tmp_path / "cache"
    process = python(BUILD, site, cache, CC=str(slow_compiler(tmp_path)))
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    finish(process)
    leftovers = [path for path in cache.rglob("*") if path.is_dir()]
    assert leftovers, "the build was killed before it began"
    assert not list(cache.rglob(COMPLETE))
    status, folder, error = finish(python(BUILD, site, cache))
    assert status == 0, error
    assert [path for path in Path(folder).parent.iterdir() if path.is_dir()] == [Path(folder)]


def test_without_a_compiler(site, tmp_path):
    status, _, error = finish(python(BUILD, site, tmp_path / "cache", CC="no-such-compiler"))
    assert status == 1
    assert error.splitlines()[-1].endswith(
        "no C compiler (no-such-compiler): the emulated NPU's libraries are built once; "
        "install one (apt-get install gcc), or name one in CC"
    )


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(site, tmp_path):
    path = tmp_path / "bad-cc"
    path.write_text("#!/bin/sh\necho 'out of disk' >&2\nexit 1\n")
    path.chmod(0o755)
    status, _, error = finish(python(BUILD, site, tmp_path / "cache", CC=str(path)))
    assert status == 1
    assert "failed:\nout of disk" in error


def test_a_cache_that_cannot_be_written(site, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, _, error = finish(python(BUILD, site, tmp_path / "file"))
    assert status == 1
    assert "no folder to build the emulator's libraries in" in error.splitlines()[-1]
    assert "QWEN2_NPU_CACHE" in error.splitlines()[-1]


@pytest.mark.slow
def test_an_unwritable_home_falls_back_to_the_temporary_folder(site, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    more = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    environment = {"QWEN2_NPU_CACHE": ""}
    status, folder, error = finish(python(BUILD, site, None, **more, **environment))
    assert status == 0, error
    assert Path(folder).is_relative_to(tmp_path / "tmp")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_trusted(site, tmp_path):
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, 12345)
    status, _, error = finish(python(BUILD, site, tmp_path / "cache"))
    assert status == 1
    assert "belongs to user 12345" in error


@pytest.mark.slow
def test_a_symbol_that_no_function_can_stand_for_is_named(tmp_path):
    folder = tmp_path / "site"
    table = 'extern "C" { extern char _ZTIN2ge7UnknownE[]; char *user(void) { return _ZTIN2ge7UnknownE; } }'
    package(folder, "torch_npu", "9.9.0", table, [])
    package(folder, "torch", "9.9.1", "int torch_thing(void) { return 1; }", [])
    status, _, error = finish(python(BUILD, folder, tmp_path / "cache"))
    assert status == 1
    assert "torch_npu 9.9.0 needs _ZTIN2ge7UnknownE, which the emulator does not provide" in error


def test_without_torch_npu(tmp_path):
    code = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch_npu' else f(n)\n"
    )
    code += "import importlib.metadata as m; v = m.version\n"
    code += "def version(n):\n    if n == 'torch_npu': raise m.PackageNotFoundError(n)\n    return v(n)\n"
    code += "m.version = version\n"
    status, _, error = finish(python(code + BUILD, tmp_path, tmp_path / "cache"))
    assert status == 1
    assert "torch_npu is not installed" in error.splitlines()[-1]
    assert "pip install" in error.splitlines()[-1]


def test_no_flag_of_one_machine():
    text = Path(libraries.__file__).read_text() + "".join(path.read_text() for path in libraries.SOURCES)
    for word in ("-march", "-m64", "-msse", "-mavx", "immintrin", "x86intrin", "__asm__", "rdtsc"):
        assert word not in text


def test_the_compiler_has_nothing_to_warn_of():
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-fsyntax-only", *map(str, libraries.SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", [*libraries.SOURCES, *libraries.HEADERS], ids=lambda path: path.name)
def test_a_change_of_any_c_file_is_another_build(file, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "_version", lambda name: "1.0")
    before = libraries._key()
    changed = tmp_path / file.name
    changed.write_bytes(file.read_bytes() + b"\n")
    for name in ("SOURCES", "HEADERS"):
        files = tuple(changed if path == file else path for path in getattr(libraries, name))
        monkeypatch.setattr(libraries, name, files)
    assert libraries._key() != before


def test_every_file_in_the_folder_of_c_files_is_known():
    folder = libraries.SOURCES[0].parent
    assert sorted(folder.iterdir()) == sorted([*libraries.SOURCES, *libraries.HEADERS])


LOAD_AS = """
import os
from qwen2_npu.emulator import libraries
key = libraries._key()  # reads the sources, which may be where only root can read them
libraries._key = lambda: key
os.setgroups([])
os.setresgid({user}, {user}, {user})
os.setresuid({user}, {user}, {user})
library = libraries.load()
print(library._name)
"""


@as_root
def test_another_user_loads_what_root_built(place):
    site = place / "site"
    package(site, "torch_npu", "9.9.0", "int user(void) {return 1;}", [])
    package(site, "torch", "9.9.1", "int torch_thing(void) { return 1; }", [])
    cache = place / "cache"
    before = os.umask(0o077)
    try:
        status, folder, error = finish(python(BUILD, site, cache))
    finally:
        os.umask(before)
    assert status == 0, error
    status, out, error = finish(python(LOAD_AS.format(user=users.USER), site, cache))
    assert (status, out) == (0, f"{folder}/{libraries.MAIN}"), error


def test_a_library_that_cannot_be_loaded_is_named(site, tmp_path):
    cache = tmp_path / "cache"
    fake = owned(tmp_path / "fake-cc", os.getuid(), 0o755, content=users.FAKE_COMPILER)
    code = "libraries.symbols.missing = lambda *_: []; libraries.symbols.tables = lambda _: (set(), set())\n"
    code = f"from qwen2_npu.emulator import libraries\n{code}libraries.load()"
    status, _, error = finish(python(code, site, cache, CC=str(fake)))
    assert status == 1
    last = error.splitlines()[-1]
    assert "EmulatorError" in last
    assert "libascendcl.so: file too short: remove " in last
    assert "noexec" in last
