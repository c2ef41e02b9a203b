"""A program that waits beside a rank, and kills what the rank has started when something kills the rank.

A process that is killed leaves its children behind, and launchers look at the ranks alone. The children are known by
what they have inherited: the launcher's variables.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")

INTERVAL = 0.2
"""Seconds between two looks at the rank. It ends the pipe, too, unless a child holds it open."""


class Keeper:
    """The program, as the rank sees it."""

    def __init__(self) -> None:
        rank = psutil.Process()
        above = [str(process.pid) for process in rank.parents()]
        watched, self._held = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(watched), str(rank.pid), str(rank.create_time()), *above],
                pass_fds=[watched],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(watched)

    def dismiss(self) -> None:
        """The rank has come to its end in order, and keeps its children."""
        with suppress(OSError):
            os.write(self._held, b"x")
        os.close(self._held)
        self._process.wait()


def main(watched: int, rank: int, since: float, above: set[int]) -> None:
    """Wait for the rank, which is the parent, to end or to dismiss this program.

    Args:
        watched: the end of a pipe that the rank writes to.
        rank: its process.
        since: when that was started.
        above: the processes that it descends from.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of launchers: for the rank
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == rank:
        if select.select([watched], [], [], INTERVAL)[0] and os.read(watched, 1):
            return
    mine = inherited(psutil.Process())
    for _ in range(2):  # what was started meanwhile
        found = [process for process in psutil.process_iter() if process.pid not in {os.getpid(), *above}]
        for process in found:
            with suppress(psutil.Error):
                if process.create_time() >= since and inherited(process) == mine and not has_parent(process, mine):
                    for each in (*process.children(recursive=True), process):
                        with suppress(psutil.Error):
                            each.kill()


def inherited(process: psutil.Process) -> dict[str, str]:
    """Of the launcher's variables, those that ``process`` was started with."""
    environment = process.environ()
    return {name: environment[name] for name in INHERITED if name in environment}


def has_parent(process: psutil.Process, mine: dict[str, str]) -> bool:
    """Whether the parent is of the same rank: then ``process`` is no orphan."""
    try:
        parent = process.parent()
        return parent is not None and inherited(parent) == mine
    except psutil.Error:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), {int(pid) for pid in sys.argv[4:]})
