"""No process outlives the one that started it: a launch that ends, however it ends, leaves nobody on the cards."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from contextlib import suppress

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Linux's prctl: the signal this process gets when its parent dies; orphans below become this process's children."""

GRACE_SECONDS = 15.0
"""For the agent to end its ranks when it is asked to."""

KILLED_SECONDS = 10.0
"""For the kernel to remove what was killed; a process that a driver holds takes longer, and is not waited for."""


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Get ``number`` when the process ``parent``, which started this one, dies; at once if it has already died.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """From now on whatever a dying descendant leaves behind is this process's child, so that it can be found.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> set[int]:
    """Process ids of all that run below ``pid``; empty where it has ended."""
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True) if _runs(child)}
    except psutil.NoSuchProcess:
        return set()


def end_descendants() -> None:
    """Kill everything below this process, what appears meanwhile included."""
    while found := descendants(os.getpid()):
        if not _kill(found):
            return


def end(agent: subprocess.Popen[bytes]) -> None:
    """End the agent and everything below it."""
    agent.terminate()  # it ends its ranks, then its other descendants
    try:
        agent.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        below = descendants(agent.pid)
        agent.kill()
        agent.wait()
        _kill(below)


def _kill(pids: set[int]) -> bool:
    """Whether all of them are gone."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
            found[-1].kill()
    _, alive = psutil.wait_procs(found, KILLED_SECONDS)
    return not any(_runs(process) for process in alive)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")
