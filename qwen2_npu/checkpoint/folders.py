"""Access to a checkpoint folder: locks that leave nothing in it, and files that cannot be read named as such."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen2_npu.errors import CheckpointError

SAVING = ".saving-"
"""How the names of folders begin in which a checkpoint is written before it replaces the one there is."""

MERGING, QUANTISING = ".merging-qkv.json", ".quantizing.json"
MERGING_PART, QUANTISING_PART = ".merging-qkv.part", ".quantizing.part"
"""Files that a folder holds while a command is writing it: whose it is, and the file that is being written."""

COMMANDS = {MERGING: "merge-qkv", QUANTISING: "quantize"}
"""Mark -> the command that leaves it."""

LOCK_SECONDS, LOCK_POLL_SECONDS = 300.0, 0.01
"""How long a folder is waited for, and how often it is tried. Nobody keeps one for more than moments."""


# ---- files that may not be readable ---------------------------------------------------------------------------------
def status(path: Path) -> os.stat_result | None:
    """What ``stat`` says about ``path``; None where there is nothing of that name.

    Raises:
        CheckpointError: it cannot be found out, for want of permission or otherwise.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name that a file can have
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file.

    Raises:
        CheckpointError: see :func:`status`.
    """
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder.

    Raises:
        CheckpointError: see :func:`status`.
    """
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def check_readable(path: Path) -> None:
    """Refuse a file that cannot be opened, before a library meets it and calls it damaged.

    Raises:
        CheckpointError: with the reason.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that is there but cannot be read."""
    if not isinstance(error, PermissionError):
        return CheckpointError(f"{path} cannot be read: {error.strerror or error}; check the disk and its mount")
    closed = next((folder for folder in reversed(path.absolute().parents) if not os.access(folder, os.X_OK)), None)
    fault, command = (path, f"chmod a+r {path}") if closed is None else (closed, f"chmod a+x {closed}")
    return CheckpointError(
        f"{path} cannot be read: {_user()} has no permission for {fault}; its owner can allow it with `{command}`"
    )


def _user() -> str:
    uid = os.geteuid()
    with suppress(KeyError):
        return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"


def sync(path: Path) -> None:
    """Make what was written survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system has it
            raise
    finally:
        os.close(handle)


# ---- locks ----------------------------------------------------------------------------------------------------------
@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold ``folder``: alone while its files are exchanged, shared while they are opened. There is no lock file.

    Yields:
        Whether it is held. A folder that is not there or may not be listed, and a file system without locks (some
        network ones) keep nobody out.

    Raises:
        CheckpointError: another process has held it for minutes.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while (held := try_lock(handle, shared=shared)) is False:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder} is held by another process, which has been saving to it or reading it for "
                    f"{LOCK_SECONDS:.0f} seconds: end that process, or use another folder"
                )
            time.sleep(LOCK_POLL_SECONDS)
        yield bool(held)
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the folder open, too, and would keep it
        os.close(handle)


def try_lock(handle: int, *, shared: bool = False) -> bool | None:
    """Lock an open folder until it is closed. False: another process holds it. None: there are no locks here."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
