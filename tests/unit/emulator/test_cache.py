"""Whose builds are used, where builds are put, and who may use them: with real users, and a compiler of no effect."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen2_npu.emulator import libraries
from qwen2_npu.emulator.cache import COMPLETE
from tests.unit.emulator.users import FAKE_COMPILER, OTHER, USER, Answer, as_root, as_user, owned

pytestmark = as_root

KEY = "build"


@pytest.fixture
def world(place, monkeypatch):
    """A user's home, a temporary folder for all, a folder of root's; and a wheel of no symbols."""
    monkeypatch.setattr(libraries, "_key", lambda: KEY)
    monkeypatch.setattr(libraries, "_package", lambda name: place)
    monkeypatch.setattr(libraries, "SOURCES", ())
    monkeypatch.setattr(libraries.symbols, "missing", lambda wheel, torch: [])
    monkeypatch.setattr(libraries.symbols, "needed_libraries", lambda wheel, torch: ["libhccl.so"])
    monkeypatch.setattr(libraries.symbols, "tables", lambda path: (set(), set()))
    owned(place / "cc", 0, 0o755, content=FAKE_COMPILER)
    monkeypatch.setenv("CC", str(place / "cc"))
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.setenv("HOME", str(place / "home"))
    for name in ("QWEN2_NPU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(
        home=owned(place / "home", USER),
        own=place / "home" / ".cache" / "qwen2_npu" / "emulator",
        shared=owned(place / "shared", 0),
        temporary=owned(place / "tmp", 0, 0o1777) / f"qwen2_npu-{USER}",
    )


def build(user: int = USER, **more: str) -> Answer:
    return as_user(user, libraries.build, **more)


def complete(folder: Path, owner: int) -> Path:
    """A finished build of ``owner``, in folders of the same."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        owned(path, owner, 0o755)
    for name in (libraries.MAIN, *libraries.LOADED_LATER):
        owned(folder / name, owner, 0o644, content="theirs")
    names = "\n".join([libraries.MAIN, *libraries.LOADED_LATER])
    owned(folder / COMPLETE, owner, 0o644, content=names)
    return folder


def refused(answer: Answer, path: Path, fault: str) -> None:
    """It names the path, the fault and the way out, in one line."""
    assert answer.kind == "EmulatorError", answer
    assert answer.error.startswith(f"{path} {fault}"), answer
    assert "QWEN2_NPU_CACHE" in answer.error
    assert "\n" not in answer.error


def test_what_another_user_put_into_the_temporary_folder_is_not_looked_at(world, place):
    """Their folder leads by a link to a build of root's: until they let it lead to theirs."""
    roots = complete(place / "roots" / KEY, 0)
    owned(owned(world.temporary, OTHER) / "emulator", OTHER)
    (world.temporary / "emulator" / KEY).symlink_to(roots)
    assert build() == Answer(str(world.own / KEY))


@pytest.mark.parametrize("level", ["folder", "emulator", "build", "library", "link", "lock"])
def test_without_a_home_what_another_user_put_into_the_temporary_folder_is_refused(world, place, level):
    os.chown(world.home, 0, 0)
    base = world.temporary / "emulator"
    if level == "link":
        complete(place / "mine" / "emulator" / KEY, USER)
        world.temporary.symlink_to(place / "mine")
        os.lchown(world.temporary, OTHER, OTHER)
        refused(build(), world.temporary, f"belongs to user {OTHER}")
        return
    folder = complete(base / KEY, USER)
    assert build() == Answer(str(folder))
    path = {"folder": world.temporary, "emulator": base, "build": folder, "library": folder / libraries.MAIN}.get(level)
    if path is None:
        shutil.rmtree(folder)
        path = base / f"{KEY}.lock"
        path.symlink_to(world.home / "file")
        refused(build(), path, "is a link")
    else:
        os.chown(path, OTHER, OTHER)
        refused(build(), path, f"belongs to user {OTHER}")


def test_a_home_of_another_user_is_refused_and_not_passed_over(world):
    os.chown(world.home, OTHER, OTHER)
    refused(build(), world.home, f"belongs to user {OTHER}")
    assert not world.temporary.exists()


@pytest.mark.parametrize("fault", ["unwritable", "unreadable", "a file"])
def test_the_temporary_folder_is_for_a_home_that_cannot_be_used(world, fault):
    if fault == "a file":
        owned(world.home / ".cache", USER, content="")
    else:
        owned(world.home, 0, 0o755 if fault == "unwritable" else 0o700)
    assert build() == Answer(str(world.temporary / "emulator" / KEY))


def test_a_home_that_can_be_used_again_is(world):
    os.chown(world.home, 0, 0)
    assert build().value.startswith(str(world.temporary))
    os.chown(world.home, USER, USER)
    assert build() == Answer(str(world.own / KEY))


def test_without_a_home_that_is_known(world):
    """Neither HOME nor the list of users names one: nothing is put into the folder that a program happens to be in."""

    def nowhere() -> Path:
        os.chdir(world.home)
        del os.environ["HOME"]
        return libraries.build()

    assert as_user(USER, nowhere) == Answer(str(world.temporary / "emulator" / KEY))
    assert not list(world.home.iterdir())


def test_no_temporary_folder_where_none_is_needed(world, monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert build() == Answer(str(world.own / KEY))
    shutil.rmtree(world.home / ".cache")
    os.chown(world.home, 0, 0)
    answer = build()
    assert answer.kind == "EmulatorError"
    assert f"({world.home / '.cache'}: Permission denied; No usable temporary directory found)" in answer.error


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("exists", [False, True])
def test_what_root_builds_in_a_shared_folder_is_for_all(world, umask, exists):
    cache = world.shared if exists else world.shared / "a" / "cache"
    built = as_user(0, libraries.build, umask=umask, QWEN2_NPU_CACHE=str(cache))
    assert built == Answer(str(cache / KEY))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [cache, cache / KEY, *(cache / KEY).iterdir()]}
    assert {modes.pop(cache.name), modes.pop(KEY)} == {0o755}
    assert set(modes.values()) == {0o644}
    before = sorted(world.shared.rglob("*"))
    for user in (USER, OTHER):
        assert build(user, QWEN2_NPU_CACHE=str(cache)) == built
    assert sorted(world.shared.rglob("*")) == before


def test_a_shared_folder_that_only_root_may_write_and_without_a_build(world):
    answer = build(QWEN2_NPU_CACHE=str(world.shared))
    assert answer.kind == "EmulatorError"
    assert f"({world.shared}: Permission denied)" in answer.error
    assert "let its owner build there once" in answer.error
    assert not list(world.shared.iterdir())


def test_a_build_that_only_root_may_read(world):
    complete(world.shared / KEY, 0).chmod(0o700)
    answer = build(QWEN2_NPU_CACHE=str(world.shared))
    assert answer.kind == "EmulatorError"
    assert f"({world.shared}: Permission denied)" in answer.error
    assert "chmod -R a+rX" in answer.error


def test_a_build_of_another_user_in_a_shared_folder_is_refused(world):
    for path in [world.shared / KEY / libraries.MAIN, world.shared / KEY / COMPLETE, world.shared / KEY]:
        complete(world.shared / KEY, 0)
        os.chown(path, OTHER, OTHER)
        refused(build(QWEN2_NPU_CACHE=str(world.shared)), path, f"belongs to user {OTHER}")
        os.chown(path, 0, 0)
    os.chown(world.shared, OTHER, OTHER)
    refused(build(QWEN2_NPU_CACHE=str(world.shared)), world.shared, f"belongs to user {OTHER}")
    refused(build(0, QWEN2_NPU_CACHE=str(world.shared)), world.shared, f"belongs to user {OTHER}")


def test_a_folder_for_all_is_no_cache(world):
    cache = world.temporary.parent
    complete(cache / KEY, USER)
    refused(build(QWEN2_NPU_CACHE=str(cache)), cache, "can be written by every user")
    mine = cache / "mine"
    assert build(QWEN2_NPU_CACHE=str(mine)) == Answer(str(mine / KEY))


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_a_folder_that_others_can_write_is_refused_before_and_after_a_build(world, mode):
    folder = owned(world.home / "cache", USER, mode)
    os.chown(folder, USER, OTHER)
    refused(build(QWEN2_NPU_CACHE=str(folder)), folder, "can be written by")
    assert not list(folder.iterdir())
    complete(folder / KEY, USER)
    refused(build(QWEN2_NPU_CACHE=str(folder)), folder, "can be written by")


def test_a_build_that_lost_a_file_is_made_again(world):
    assert build() == Answer(str(world.own / KEY))
    (world.own / KEY / libraries.LOADED_LATER[0]).unlink()
    assert build() == Answer(str(world.own / KEY))
    assert (world.own / KEY / libraries.LOADED_LATER[0]).read_text() == "library\n"


NO_MOUNTS = "a file system cannot be mounted on this machine"


def on_a_small_disk(disk: Path) -> object:
    """Build in a mount namespace of its own, where ``disk`` holds 48 KiB."""
    clone_newns = 0x20000
    commands = ["mount --make-rprivate /", f"mount -t tmpfs -o size=48k,mode=755 none {disk}"]
    if ctypes.CDLL(None).unshare(clone_newns) or subprocess.run(["sh", "-c", " && ".join(commands)]).returncode:
        return NO_MOUNTS
    return libraries.build()


@pytest.mark.parametrize("whose", ["source", "library"])
def test_a_full_disk_is_told_with_its_folder(world, place, monkeypatch, whose):
    if whose == "source":
        monkeypatch.setattr(libraries, "source_for", lambda names: "x" * 100_000)
    else:
        owned(place / "cc", 0, 0o755, content=f'{FAKE_COMPILER}head -c 100000 /dev/zero > "$output"\n')
    answer = as_user(0, lambda: on_a_small_disk(world.shared), QWEN2_NPU_CACHE=str(world.shared))
    if answer.value == NO_MOUNTS:
        pytest.skip(NO_MOUNTS)
    assert answer.kind == "EmulatorError", answer
    assert f"({world.shared}: " in answer.error
    assert "No space left on device" in answer.error
    assert "free space" in answer.error
    assert "\n" not in answer.error
