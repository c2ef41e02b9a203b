"""Where built libraries are kept: in the user's cache folder, and shared with other users where root built them.

Code is loaded from here. A folder or file that another user could change is an error, and not passed over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from qwen2_npu.emulator import trusted
from qwen2_npu.emulator.settings import EmulatorError

COMPLETE = "complete"
"""Marker file of a finished build: the names of its libraries."""

Build = Callable[[Path], list[str]]
"""Fills a folder, and returns the names of what is to be loaded from it. Its OSErrors are those of that folder."""


def folder(key: str, build: Build) -> Path:
    """Folder of the finished build of the name ``key``; builds where no other process has.

    A finished build is used without a lock and without writing. The temporary folder is for a home that cannot be used.

    Raises:
        EmulatorError: another user could change what is there, or there is nowhere to build.
    """
    chosen = os.environ.get("QWEN2_NPU_CACHE", "")
    problems: list[str] = []
    for place in [lambda: Path(chosen)] if chosen else [_in_home, _in_temporary_folder]:
        base = None
        try:
            base = place()
            return _finished(base, key) or _built(base, key, build, for_all=bool(chosen))
        except OSError as error:
            problems.append(_problem(error, base))
    own = "free space where a disk is full, make one of them writable"
    shared = "free space if the disk is full, let its owner build there once and `chmod -R a+rX` it"
    raise EmulatorError(
        f"no folder to build the emulator's libraries in ({'; '.join(problems)}): {shared if chosen else own}, "
        "or set QWEN2_NPU_CACHE to a folder that you can write"
    )


def names(build: Path) -> list[str]:
    """Names of what is to be loaded from the folder of a finished build."""
    return (build / COMPLETE).read_text(encoding="utf-8").splitlines()


def _in_home() -> Path:
    try:
        path = Path(platformdirs.user_cache_dir("qwen2_npu")) / "emulator"
    except RuntimeError:  # of newer platformdirs; older ones give a path below "~"
        path = Path("~")
    if not path.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "no home folder is known (HOME is not set)")
    return path


def _in_temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"qwen2_npu-{os.geteuid()}" / "emulator"


def _problem(error: OSError, base: Path | None) -> str:
    """What is wrong with ``base``, or with a folder that leads to it."""
    place = error.filename if isinstance(error.filename, str) else base
    if base is not None and place is not None and Path(place).is_relative_to(base):
        place = base  # names of files in it mean nothing to the user
    what = error.strerror or str(error)
    return what if place is None else f"{place}: {what}"


def _finished(base: Path, key: str) -> Path | None:
    """The folder of a finished build, its files checked; None where there is none."""
    try:
        build = trusted.folder(trusted.folder(base) / key)
        trusted.file(build / COMPLETE)
        found = names(build)
        for name in found:
            trusted.file(build / name)
    except FileNotFoundError:
        return None
    return build if found else None


def _built(base: Path, key: str, build: Build, for_all: bool) -> Path:
    """Build below ``base``, one process at a time. ``for_all``: other users may read the folders made."""
    base = trusted.folder(base, make=True, for_all=for_all)
    lock = base / f"{key}.lock"
    with contextlib.suppress(FileNotFoundError):
        trusted.file(lock)
    with FileLock(lock, mode=0o644):
        found = _finished(base, key)
        if found is None:
            found = base / key
            _build_beside(found, build)
    return found


def _build_beside(target: Path, build: Build) -> None:
    """Build beside ``target`` and move into place, so that a killed build leaves nothing that looks finished."""
    for stale in target.parent.glob(f"{target.name}.*"):  # of killed builds: the lock is held, none is running
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        built = build(work)
        (work / COMPLETE).write_text("\n".join(built), encoding="utf-8")
        # Nothing in it is secret: what root builds in a folder for all is for all, whatever the umask is.
        for name in (COMPLETE, *built):
            (work / name).chmod(0o644)
        work.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
