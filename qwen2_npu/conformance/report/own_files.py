"""Which files of a results folder a nightly run made: only those may a later run remove, and one run at a time."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen2_npu.conformance.files import explained, write_json
from qwen2_npu.conformance.report import inputs

RECORD, LOCK = ".nightly.json", ".nightly.lock"
LOGS = "logs"

READ = (inputs.VERIFY, inputs.JUNIT, inputs.BENCHMARK, inputs.BENCH, inputs.RUN, inputs.PREDICTIONS)
"""What the report reads: a file that is not of this run must not speak for it."""

SHOWN = 5
"""Names in a message."""

ELSEWHERE = "name another --results"
"""How the user of a nightly run chooses another folder."""


class OwnFiles:
    """The files that nightly runs made in ``folder``, from the record that they keep there.

    The record holds, by name, the size and the time of change of each file at the end of the run that made it. A file
    that was changed since is the user's. While a run lasts it holds None for each: where a run was killed, the files of
    these names are its own, since there were none when it started.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = recorded(folder).get("files")
        self._made: dict[str, list[int] | None] = files if isinstance(files, dict) else {}
        self._write()  # with the number of this process

    def start(self, names: Iterable[str]) -> None:
        """Remove what earlier runs made, and take ``names`` for this run.

        Raises:
            ValueError: other files have these names, or would be read by the report. Nothing was removed then.
            OSError: the folder cannot be written.
        """
        wanted = sorted(names)
        logs = self.folder / LOGS
        if os.path.lexists(logs) and (logs.is_symlink() or not logs.is_dir()):
            raise ValueError(f"{logs} is not a folder of its own: move it, or {ELSEWHERE}")
        there = {name for name in wanted if os.path.lexists(self.folder / name)}
        there |= {path.name for pattern in READ for path in self.folder.glob(pattern)}
        foreign = sorted(name for name in there if not self._is_own(name))
        if foreign:
            more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
            raise ValueError(
                f"{self.folder} holds files that no nightly run made, or that were changed since: "
                f"{', '.join(foreign[:SHOWN])}{more}; this run would overwrite them or report them as its results: "
                f"move them, or {ELSEWHERE}"
            )
        for name in filter(self._is_own, self._made):
            with explained(self.folder / name, ELSEWHERE):
                (self.folder / name).unlink()
        with explained(logs, ELSEWHERE):
            logs.mkdir(exist_ok=True)
        self._made = dict.fromkeys(wanted)
        self._write()

    def finish(self) -> None:
        """Record what this run made."""
        found = {name: _stamp(self.folder / name) for name in self._made}
        self._made = {name: stamp for name, stamp in found.items() if stamp is not None}
        with suppress(OSError):  # what start() wrote stays, and serves as well
            self._write()

    def renew(self, name: str) -> None:
        """What this project wrote again stays a file of the run that made it first."""
        stamp = _stamp(self.folder / name)
        if self._made.get(name) is not None and stamp is not None:
            self._made[name] = stamp
            self._write()

    def _is_own(self, name: str) -> bool:
        path = self.folder / name
        if name not in self._made or path.parent not in (self.folder, self.folder / LOGS):
            return False
        stamp = _stamp(path)
        return stamp is not None and self._made[name] in (None, stamp)

    def _write(self) -> None:
        with explained(self.folder / RECORD, ELSEWHERE):
            write_json(self.folder / RECORD, {"process": os.getpid(), "files": self._made})


@contextmanager
def locked(folder: Path) -> Iterator[OwnFiles]:
    """The folder for this run alone; it is made where there is none.

    Raises:
        ValueError: another run has it.
        OSError: it cannot be made or written.
    """
    with explained(folder, ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if path.is_symlink():
        raise ValueError(f"{path} is a link: remove it, or {ELSEWHERE}")
    lock = FileLock(path)
    with explained(path, ELSEWHERE):
        try:
            lock.acquire(blocking=False)
        except Timeout:  # an OSError, too
            process = recorded(folder).get("process")
            raise ValueError(
                f"another nightly run{f' (process {process})' if process else ''} writes into {folder}: wait for its "
                f"end, or {ELSEWHERE}"
            ) from None
    try:
        yield OwnFiles(folder)
    finally:
        lock.release()


def rewritten(path: Path) -> None:
    """Tell the record, where ``path`` is of a nightly run, that a command of this project has written it again.

    Else the next run there would take it for the user's own and be refused, although the documentation says to run
    `qwen2-npu verify` and `qwen2-npu report` again. While a run is at work, the file is that run's anyway.
    """
    files = recorded(path.parent).get("files")
    if not isinstance(files, dict) or files.get(path.name) is None:
        return
    with suppress(OSError, ValueError), locked(path.parent) as own:
        own.renew(path.name)


def recorded(folder: Path) -> Mapping[str, Any]:
    """What the last run wrote into its record; nothing where there is none or it is damaged."""
    with suppress(OSError, ValueError):
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _stamp(path: Path) -> list[int] | None:
    """Size and time of change; None for what is no regular file of its own, such as a link."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else None
