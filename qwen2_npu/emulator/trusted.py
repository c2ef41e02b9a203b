"""Where code may be loaded from: folders and files that nobody but the user and root can change.

Paths are checked from the root down, and links are not followed but read and checked. Nobody else can change what has
been checked, so it is still the same when it is used.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import shlex
import stat
from pathlib import Path

from qwen2_npu.emulator.settings import EmulatorError

ROOT = 0

MAX_LINKS = 40
"""Links that one path may lead through, as in the kernel."""

ALL_USERS = 2**32 - 1
"""How many user numbers the first user namespace has; another one has fewer."""

RULE = "the emulator loads code only from what belongs to you or root and nobody else can write"
ELSEWHERE = "set QWEN2_NPU_CACHE to a folder of yours"


def folder(path: Path, make: bool = False, for_all: bool = False) -> Path:
    """``path`` as it is without links, after a check of every folder and link that leads to it.

    A folder that all may write in, but where nobody can remove what belongs to others (the sticky bit, as of /tmp), may
    lead to it, and cannot be it.

    Args:
        path: the folder.
        make: make what is missing of it.
        for_all: let every user read the folders made, whatever the umask is.

    Raises:
        EmulatorError: another user could change what is there.
        OSError: it is missing, is not a folder, or cannot be read or made.
    """
    here, followed = Path("/"), 0
    left = [*reversed(path.absolute().parts)]
    while left:
        name = left.pop()
        child = here.parent if name == ".." else here / name
        try:
            status = child.lstat()
        except FileNotFoundError:
            if not make:
                raise
            _make(child, for_all)
            left.append(name)
            continue
        if stat.S_ISLNK(status.st_mode):
            followed += 1
            if followed > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            _check_owner(child, status, leads_on=True)
            left.extend(reversed(child.readlink().parts))
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(child))
        _check_owner(child, status, leads_on=bool(left))
        if not (left and status.st_mode & stat.S_ISVTX):
            _check_writers(child, status)
        here = child
    return here


def file(path: Path) -> None:
    """Check a file of a folder that has been checked.

    Raises:
        EmulatorError: another user could change it, or it is not a regular file.
        OSError: it is missing.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise EmulatorError(f"{path} is {kind}, where the emulator has regular files only: remove it, or {ELSEWHERE}")
    _check_owner(path, status, leads_on=False)
    _check_writers(path, status)


def _make(path: Path, for_all: bool) -> None:
    with contextlib.suppress(FileExistsError):  # made by another process meanwhile: it is checked like any other
        path.mkdir(0o755)
        if for_all:
            path.chmod(0o755)


def _check_owner(path: Path, status: os.stat_result, leads_on: bool) -> None:
    """Raise where ``path`` belongs to somebody else. ``leads_on``: it only leads to what is used."""
    owner = status.st_uid
    if owner in (ROOT, os.geteuid()):
        return
    # In a sandbox, the host's root has no number, and / and /home belong to "nobody". Whoever that is, it is not a user
    # who made it in a folder for all.
    if leads_on and owner == _nobody_of_sandbox() and not path.parent.lstat().st_mode & stat.S_ISVTX:
        return
    remedy = ELSEWHERE if leads_on else f"remove it if nobody needs it, or {ELSEWHERE}"
    raise EmulatorError(f"{path} belongs to user {owner}, and {RULE}: {remedy}")


def _check_writers(path: Path, status: os.stat_result) -> None:
    """Raise where others than the owner can write."""
    mode = status.st_mode
    if mode & stat.S_IWOTH:
        writers = "every user"
    elif mode & stat.S_IWGRP and not _is_private_group(status):
        writers = f"group {status.st_gid}"
    else:
        return
    remedy = f"chmod go-w {shlex.quote(str(path))}"
    if mode & stat.S_ISVTX:  # a folder for all is meant to be one
        remedy = "take a folder of its own below it"
    raise EmulatorError(f"{path} can be written by {writers}, and {RULE}: {remedy}, or {ELSEWHERE}")


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the group is the user's own, with no other member: with such groups the umask is 002 by default."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return (
        status.st_uid == user.pw_uid != ROOT
        and (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name)
        and set(group.gr_mem) <= {user.pw_name}
    )


def _nobody_of_sandbox() -> int | None:
    """The owner that files of users without a number here seem to have; None where every user has a number."""
    try:
        ranges = Path("/proc/self/uid_map").read_text().splitlines()
        if sum(int(line.split()[2]) for line in ranges) >= ALL_USERS:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError, IndexError):
        return None
