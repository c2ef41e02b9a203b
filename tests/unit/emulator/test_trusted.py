"""Whose folders and files code is loaded from: real users, real links, real modes."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2_npu.emulator import trusted
from tests.unit.emulator.users import OTHER, USER, Answer, as_root, as_user, owned

pytestmark = as_root


def folder(path: Path) -> Answer:
    return as_user(USER, lambda: trusted.folder(path))


def file(path: Path) -> Answer:
    return as_user(USER, lambda: trusted.file(path))


def chain(place: Path) -> list[Path]:
    """Folders inside one another: root's, the user's, the user's."""
    return [owned(place / "a", 0), owned(place / "a" / "b", USER), owned(place / "a" / "b" / "c", USER)]


def test_folders_of_the_user_and_of_root(place):
    *_, last = chain(place)
    assert folder(last) == Answer(str(last))
    os.chown(last, 0, 0)
    assert folder(last) == Answer(str(last))


@pytest.mark.parametrize("level", range(3))
def test_a_folder_of_another_user_anywhere_on_the_way(place, level):
    folders = chain(place)
    os.chown(folders[level], OTHER, OTHER)
    answer = folder(folders[-1])
    assert answer.kind == "EmulatorError"
    assert answer.error.startswith(f"{folders[level]} belongs to user {OTHER}, and ")
    assert answer.error.endswith("set QWEN2_NPU_CACHE to a folder of yours")
    assert ("remove it" in answer.error) == (level == 2)
    assert "\n" not in answer.error


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize(("mode", "who"), [(0o775, "group "), (0o757, "every user"), (0o777, "every user")])
def test_a_folder_that_others_can_write_anywhere_on_the_way(place, level, mode, who):
    folders = chain(place)
    folders[level].chmod(mode)
    answer = folder(folders[-1])
    assert answer.kind == "EmulatorError"
    assert answer.error.startswith(f"{folders[level]} can be written by {who}")
    assert f"chmod go-w {folders[level]}" in answer.error


def test_a_folder_for_all_leads_to_one_and_is_none(place):
    public = owned(place / "tmp", 0, 0o1777)
    assert folder(owned(public / "mine", USER)).value == str(public / "mine")
    for path in (public, public / "mine" / ".."):
        answer = folder(path)
        assert answer.error.startswith(f"{public} can be written by every user")
        assert "take a folder of its own below it" in answer.error
    assert f"{public / 'theirs'} belongs to user {OTHER}" in folder(owned(public / "theirs", OTHER)).error


@pytest.mark.parametrize("owner", [0, USER, OTHER])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_links(place, owner, relative, last):
    public = owned(place / "tmp", 0, 0o1777)
    owned(owned(place / "real", USER) / "cache", USER)
    wanted = place / "real" / "cache" if last else place / "real"
    link = public / "link"
    link.symlink_to(Path("..") / wanted.relative_to(place) if relative else wanted)
    os.lchown(link, owner, owner)
    answer = folder(link if last else link / "cache")
    if owner == OTHER:
        assert answer.error.startswith(f"{link} belongs to user {OTHER}")
    else:
        assert answer == Answer(str(place / "real" / "cache"))


def test_what_a_link_leads_to_is_checked(place):
    theirs = owned(place / "theirs", OTHER)
    owned(theirs / "cache", USER)
    (place / "link").symlink_to(theirs / "cache")
    assert folder(place / "link").error.startswith(f"{theirs} belongs to user {OTHER}")


def test_a_link_to_a_folder_for_all(place):
    (place / "link").symlink_to(owned(place / "tmp", 0, 0o1777))
    assert folder(place / "link").error.startswith(f"{place / 'tmp'} can be written by every user")


def test_paths_and_the_folder_that_the_process_is_in(place):
    *_, last = chain(place)

    def check(path: Path, here: Path, gone: bool = False) -> object:
        os.chdir(here)
        if gone:
            here.rmdir()
        return trusted.folder(path)

    assert as_user(USER, lambda: check(Path("b/../b/c"), place / "a")) == Answer(str(last))
    inside = owned(last / "inside", USER)
    assert as_user(USER, lambda: check(last, inside, gone=True)) == Answer(str(last))
    inside = owned(last / "inside", USER)
    assert as_user(USER, lambda: check(Path("x"), inside, gone=True)).kind == "FileNotFoundError"


def test_links_in_a_circle(place):
    (place / "a").symlink_to(place / "b")
    (place / "b").symlink_to(place / "a")
    assert folder(place / "a").error == str(OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(place / "a")))


@pytest.mark.parametrize(("name", "kind"), [("missing", "FileNotFoundError"), ("file/x", "NotADirectoryError")])
def test_what_is_no_folder(place, name, kind):
    (place / "file").write_text("")
    (place / "file").chmod(0o666)
    assert folder(place / name).kind == kind


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("for_all", [False, True])
def test_folders_that_are_made(place, umask, for_all):
    home = owned(place / "home", USER)
    path = home / "x" / "y"
    answer = as_user(USER, lambda: trusted.folder(path, make=True, for_all=for_all), umask=umask)
    assert answer == Answer(str(path))
    modes = {stat.S_IMODE(made.stat().st_mode) for made in (path, path.parent)}
    assert modes == {0o755 if for_all else 0o755 & ~umask}


def test_a_folder_that_cannot_be_made(place):
    answer = as_user(USER, lambda: trusted.folder(place / "x" / "y", make=True))
    assert (answer.kind, f"'{place / 'x'}'" in answer.error) == ("PermissionError", True)


@pytest.mark.parametrize(
    ("owner", "mode", "fault"),
    [
        (USER, 0o644, ""),
        (0, 0o755, ""),
        (OTHER, 0o644, f"belongs to user {OTHER}"),
        (USER, 0o664, "can be written by group"),
        (0, 0o646, "can be written by every user"),
    ],
)
def test_files(place, owner, mode, fault):
    path = owned(place / "lib.so", owner, mode, content="")
    answer = file(path)
    assert answer.kind == ("EmulatorError" if fault else "")
    assert answer.error.startswith(f"{path} {fault}" if fault else "")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "a link"),
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
    ],
)
def test_what_is_no_regular_file(place, make: Callable[[Path], None], kind):
    make(place / "lib.so")
    assert file(place / "lib.so").error.startswith(f"{place / 'lib.so'} is {kind}")


def test_a_group_with_nobody_else_in_it(place):
    """Where the umask is 002, each user has a group of the same name."""
    try:
        user = pwd.getpwnam("daemon")
    except KeyError:
        pytest.skip("there is no user of the name daemon")
    if user.pw_gid == OTHER or user.pw_uid == 0:
        pytest.skip("daemon has no group of its own")
    path = owned(place / "home", user.pw_uid, 0o775)
    os.chown(path, user.pw_uid, user.pw_gid)

    def check() -> Answer:
        return as_user(user.pw_uid, lambda: trusted.folder(path), group=user.pw_gid)

    assert check() == Answer(str(path))
    os.chown(path, user.pw_uid, OTHER)
    assert f"{path} can be written by group {OTHER}" in check().error
    os.chown(path, 0, user.pw_gid)
    assert f"{path} can be written by group {user.pw_gid}" in check().error
    os.chown(path, user.pw_uid, user.pw_gid)
    path.chmod(0o777)
    assert f"{path} can be written by every user" in check().error


def test_root_has_no_private_group(place):
    path = owned(place / "shared", 0, 0o775)
    assert as_user(0, lambda: trusted.folder(path)).error.startswith(f"{path} can be written by group 0")


NO_NAMESPACES = "users may not make user namespaces on this machine"


def in_sandbox(function: Callable[[], object]) -> object:
    """In a user namespace where only this user has a number, as bwrap and unshare make it."""
    library = ctypes.CDLL(None, use_errno=True)
    user = os.geteuid()
    pr_set_dumpable, clone_newuser = 4, 0x10000000
    library.prctl(pr_set_dumpable, 1, 0, 0, 0)  # or /proc/self/uid_map would belong to root
    if library.unshare(clone_newuser):
        return NO_NAMESPACES
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    return function()


def test_a_sandbox_where_root_has_no_number(place):
    """There / and /home seem to belong to nobody: they may lead to a folder of the user, and cannot be one."""
    owned(place, USER)
    public, roots = owned(place / "tmp", 0, 0o1777), owned(place / "home", 0)
    mine = owned(roots / "mine", USER)
    theirs = owned(public / "theirs", OTHER)

    def check(path: Path) -> Answer:
        return as_user(USER, lambda: in_sandbox(lambda: trusted.folder(path)))

    answer = check(mine)
    if answer.value == NO_NAMESPACES:
        pytest.skip(NO_NAMESPACES)
    assert answer == Answer(str(mine))
    assert check(roots).error.startswith(f"{roots} belongs to user")
    assert check(theirs).error.startswith(f"{theirs} belongs to user")
    assert check(owned(theirs / "mine", USER)).error.startswith(f"{theirs} belongs to user")
