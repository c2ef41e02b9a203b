"""Names in ELF tables, on libraries of a few functions."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from qwen2_npu.emulator import symbols
from qwen2_npu.emulator.settings import EmulatorError
from tests.unit.emulator import users

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def library(folder, name, source, *flags):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", *flags, "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


USER = "int aclrtThing(void); int torch_thing(void); int Py_Thing(void); void *malloc(unsigned long);\n"
USER += "__attribute__((weak)) int optional(void);\n"
USER += "int user(void) { return aclrtThing() + torch_thing() + Py_Thing() + (malloc(1) != 0) + (optional != 0); }\n"


def test_tables(tmp_path):
    undefined, defined = symbols.tables(library(tmp_path, "libuser.so", USER))
    assert {"aclrtThing", "torch_thing", "Py_Thing", "malloc"} <= undefined
    assert "optional" not in undefined
    assert "user" in defined


def test_missing_is_what_nobody_has(tmp_path):
    wheel, torch = tmp_path / "wheel", tmp_path / "torch"
    library(wheel / "lib", "libuser.so", USER)
    library(wheel / "lib", "libother.so", "int user(void); int helper(void) { return user(); }")
    library(torch / "lib", "libtorch.so", "int torch_thing(void) { return 1; }")
    assert symbols.missing(wheel, torch) == ["aclrtThing"]


def test_needed_libraries(tmp_path):
    wheel, torch = tmp_path / "wheel", tmp_path / "torch"
    library(tmp_path, "libcann.so", "int aclrtThing(void) { return 1; }")
    library(torch, "libtorch.so", "int torch_thing(void) { return 1; }")
    flags = [f"-L{tmp_path}", f"-L{torch}", "-Wl,--no-as-needed", "-l:libcann.so", "-l:libtorch.so"]
    library(wheel, "libuser.so", USER, *flags)
    assert symbols.needed_libraries(wheel, torch) == ["libcann.so"]


def test_broken_installations_are_named(tmp_path):
    with pytest.raises(EmulatorError, match=f"no shared library in {tmp_path}: reinstall torch_npu"):
        symbols.missing(tmp_path, tmp_path)
    (tmp_path / "libbroken.so").write_text("half a download")
    with pytest.raises(EmulatorError, match=r"libbroken.so is not a shared library"):
        symbols.missing(tmp_path, tmp_path)


@users.as_root
def test_a_library_that_this_user_cannot_read_is_named(place):
    path = place / "libuser.so"
    path.write_text("")
    path.chmod(0o600)
    answer = users.as_user(users.USER, lambda: symbols.missing(place, place))
    assert answer.kind == "EmulatorError"
    assert answer.error == f"{path} cannot be read (Permission denied): make it readable"
