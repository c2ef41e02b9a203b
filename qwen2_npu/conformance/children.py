"""Programs that end with the process that started them, whatever ends it, together with every process they start.

Between the two stands a supervisor: this file, run as a program. It holds the reading end of a pipe whose writing end
only the parent has. When a byte comes, or the pipe's end (the parent is gone, even by SIGKILL), it kills all that
descends from the program. On Linux it is a subreaper: a process that left its group or its parent is still found.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a run to stop."""

NOT_STARTED = 127
"""Exit status of a program that cannot be started, as a shell gives it."""

LINUX = sys.platform == "linux"
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""

ONE_HANGUP = 1.0
"""Seconds in which a second SIGHUP tells of the same event: where a terminal closes, both kernel and shell send it."""

PATIENCE = 10.0
"""Seconds in which killed processes must be gone; one that hangs in a driver is left behind then."""


class Child:
    """A program under a supervisor. Its output, errors included, is ``output``, line by line.

    Args:
        command: the program and its arguments.
        cwd: the folder that it runs in.
        env: its environment; default: this process's.
    """

    def __init__(self, command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        watched, self._held = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(watched), *command],
                cwd=cwd,
                env=env,
                pass_fds=[watched],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which decides
            )
        except BaseException:
            os.close(self._held)
            raise
        finally:
            os.close(watched)
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self._sweeper = threading.Thread(target=self._sweep, daemon=True)
        self._sweeper.start()

    def end(self) -> None:
        """Kill the program and all its processes; :meth:`wait` waits until they are gone. May be called repeatedly."""
        with suppress(BrokenPipeError):
            os.write(self._held, b"x")

    def wait(self) -> int:
        """The exit status; negative for a signal. Not to be called twice."""
        self._sweeper.join()
        os.close(self._held)
        self.output.close()
        return self._process.wait()

    def _sweep(self) -> None:
        """When the supervisor has ended, end its group: only one that was killed itself leaves something there.

        That would hold the output, so that whoever reads it waits for an end that nobody brings about.
        """
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)


def run_to_end(
    command: Sequence[str], seconds: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[int | None, list[str]]:
    """Run a program until it ends, but no longer than ``seconds``. Nothing of it is left afterwards.

    Returns:
        Its exit status, None where the time was over; and its output, line by line.
    """
    child, late = Child(command, cwd, env), threading.Event()

    def give_up() -> None:
        late.set()
        child.end()

    timer = threading.Timer(seconds, give_up)
    timer.start()
    try:
        lines = [line.rstrip() for line in child.output]
    except BaseException:  # an interrupt: nobody waits for the rest
        child.end()
        raise
    finally:
        timer.cancel()
        timer.join()
        status = child.wait()
    return (None if late.is_set() else status), lines


class Stop:
    """The wish to stop, by a signal. The first one ends the running child; a second one ends this process at once.

    Attributes:
        number: of the signal; None while there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._child: Child | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals set ``number`` in place of ending the process. What nohup ignores stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
        try:
            for number in heard:
                signal.signal(number, lambda number, frame: self._ask(number, heard))
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])

    def _ask(self, number: int, heard: Sequence[signal.Signals]) -> None:
        if self.number is not None:  # a second SIGHUP: the others have their own effect by now
            if time.monotonic() - self._since > ONE_HANGUP:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.number, self._since = number, time.monotonic()
        for each in heard:
            if not each == number == signal.SIGHUP:
                signal.signal(each, signal.SIG_DFL)
        if self._child is not None:
            self._child.end()

    @contextmanager
    def ends(self, child: Child) -> Iterator[None]:
        """Within it, a signal ends ``child``."""
        self._child = child
        try:
            if self.number is not None:  # it came while the child was started
                child.end()
            yield
        finally:
            self._child = None

    @property
    def status(self) -> int:
        """The exit status that tells of the signal, as a shell gives it."""
        return 128 + (self.number or signal.SIGINT)

    @property
    def reason(self) -> str:
        """For people."""
        return f"interrupted by {signal.Signals(self.number or signal.SIGINT).name}"


# ---- the supervisor -------------------------------------------------------------------------------------------------
def supervise(watched: int, command: Sequence[str]) -> int:
    """Run ``command`` until it ends or ``watched`` or a signal says so; then end all that descends from it.

    Returns:
        Its exit status as :class:`subprocess.Popen` gives it.
    """
    os.set_inheritable(watched, False)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *(each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN)):
        signal.signal(number, _noted)
    try:
        _prctl(SET_CHILD_SUBREAPER, 1)()
        child = subprocess.Popen(command, preexec_fn=_prctl(SET_PDEATHSIG, signal.SIGKILL))
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror or error}", flush=True)
        return NOT_STARTED
    status = None
    while (status := _reaped(child.pid, status)) is None:
        ready, _, _ = select.select([watched, woken], [], [])
        if watched in ready or any(number != signal.SIGCHLD for number in os.read(woken, 4096)):
            break
    me, until = psutil.Process(), time.monotonic() + PATIENCE
    while (found := me.children(recursive=True)) and time.monotonic() < until:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.002)
        status = _reaped(child.pid, status)
    child.returncode = 0 if status is None else status  # Popen must not wait for it
    return -signal.SIGKILL if status is None else status


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up pipe has it."""


def _prctl(option: int, value: int) -> Callable[[], None]:
    """A call of prctl(2) that is ready to be made, also between fork and exec."""
    if not LINUX:
        return lambda: None
    call = ctypes.CDLL(None).prctl
    return lambda: call(option, ctypes.c_ulong(value), 0, 0, 0)


def _reaped(pid: int, status: int | None) -> int | None:
    """Take in every child that ended, the adopted ones too. The status of ``pid`` as soon as it is known."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == pid:
                status = os.waitstatus_to_exitcode(found[1])
    return status


def _exit(status: int) -> None:
    """End as the program did: by the same signal, and without a second core file."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    _exit(supervise(int(sys.argv[1]), sys.argv[2:]))
