"""Nothing outlives the process that started it, whatever ends that one. Real processes, real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qwen2_npu.conformance.children import NOT_STARTED, Child, Stop, run_to_end

pytestmark = pytest.mark.usefixtures("hangups")

GONE = 10.0
"""Seconds in which all processes must be gone; milliseconds on a machine that has nothing else to do."""

FAMILY = """
import os, signal, subprocess, sys, time
for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(each, signal.SIG_IGN)
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(120)"]
pids = [os.getpid(), subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
read, write = os.pipe()
if os.fork() == 0:  # a daemon: in a session of its own, and its parent is gone
    os.setsid()
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
        time.sleep(120)
    os._exit(0)
os.wait()
pids.append(int(os.read(read, 20)))
print("PIDS", *pids, flush=True)
time.sleep(float(sys.argv[1]))
"""
"""A stubborn program, its child, one in another session, and a daemon."""

PARENT = """
import sys
from qwen2_npu.conformance.children import Child
child = Child([sys.executable, "-c", sys.argv[1], "120"])
for line in child.output:
    print(line, end="", flush=True)
"""


def pids_in(line: str) -> list[psutil.Process]:
    assert line.startswith("PIDS "), line
    return [psutil.Process(int(pid)) for pid in line.split()[1:]]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether they end. One that is dead holds nothing, even if its new parent takes seconds to notice."""
    until = time.monotonic() + GONE
    while (found := any(map(runs, processes))) and time.monotonic() < until:
        time.sleep(0.002)
    return not found


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, FAMILY], stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_processes_end_with_the_parent(parent: subprocess.Popen[str], number: signal.Signals) -> None:
    assert parent.stdout is not None
    family = pids_in(parent.stdout.readline())
    assert len(family) == 4
    parent.send_signal(number)
    assert parent.wait() == -number
    assert all_gone(family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_all_processes_end_with_the_supervisor(parent: subprocess.Popen[str], number: signal.Signals) -> None:
    """Service managers send the signal to every process of the service."""
    assert parent.stdout is not None
    family = pids_in(parent.stdout.readline())
    supervisor = family[0].parent()
    assert supervisor is not None
    assert supervisor.ppid() == parent.pid
    supervisor.send_signal(number)
    assert all_gone([supervisor, *family])


def test_a_supervisor_that_is_killed_leaves_nobody_who_holds_the_output() -> None:
    """Reading it ends then; it would go on for as long as the program's own child runs."""
    code = (
        "import os, subprocess; sleep = subprocess.Popen(['sleep', '120']); "
        "print('PIDS', os.getpid(), sleep.pid, flush=True); sleep.wait()"
    )
    child = Child([sys.executable, "-S", "-c", code])
    family = pids_in(child.output.readline())
    psutil.Process(child._process.pid).kill()
    start = time.monotonic()
    assert child.output.read() == ""
    assert time.monotonic() - start < GONE
    assert child.wait() == -signal.SIGKILL
    assert all_gone(family)


def test_the_program_does_not_outlive_a_supervisor_that_is_killed() -> None:
    child = Child([sys.executable, "-c", "import time; print('started', flush=True); time.sleep(120)"])
    assert child.output.readline() == "started\n"
    supervisor = psutil.Process(child._process.pid)
    program = supervisor.children()
    supervisor.kill()
    assert child.wait() == -signal.SIGKILL
    assert all_gone(program)


def test_ending_it() -> None:
    child = Child([sys.executable, "-c", FAMILY, "120"])
    family = pids_in(child.output.readline())
    child.end()
    child.end()
    assert child.output.read() == "", "the output ends with the processes"
    assert child.wait() == -signal.SIGKILL
    assert not any(process.is_running() for process in family), "wait() waits for all of them"


def test_what_a_program_leaves_behind_ends_with_it() -> None:
    child = Child([sys.executable, "-c", FAMILY, "0"])
    _, *family = child.output.readline().split()  # some may have ended by now
    assert len(family) == 4
    assert child.output.read() == ""
    assert child.wait() == 0
    assert not any(psutil.pid_exists(int(pid)) for pid in family)


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", -11), ("import os; os.abort()", -6)],
)
def test_exit_status(code: str, status: int, tmp_path: Path) -> None:
    child = Child([sys.executable, "-S", "-c", code], cwd=tmp_path)
    assert child.output.read() == ""
    assert child.wait() == status
    assert not list(tmp_path.iterdir()), "no core file of the supervisor"


def test_a_program_that_cannot_be_started() -> None:
    child = Child(["/no/such/program", "x"])
    assert child.output.read() == "/no/such/program cannot be started: No such file or directory\n"
    assert child.wait() == NOT_STARTED


def test_the_program_has_the_environment_of_its_parent(tmp_path: Path) -> None:
    """Folder, errors beside the output, and the signals that it expects."""
    code = (
        "import os, signal, sys; print(os.getcwd(), len(os.listdir('/proc/self/fd')), file=sys.stderr); "
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGCHLD).name)"
    )
    child = Child([sys.executable, "-u", "-c", code], cwd=tmp_path)
    text = child.output.read()
    assert child.wait() == 0, text
    assert text == f"{tmp_path} 4\nTrue SIG_DFL\n"


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            child = Child([sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGHUP).name)"])
            assert child.output.read() == "SIG_IGN\n"
            assert child.wait() == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_told_and_the_second_has_its_own_effect() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        until = time.monotonic() + 1
        while stop.number is None and time.monotonic() < until:
            pass
        assert (stop.number, stop.status, stop.reason) == (15, 143, "interrupted by SIGTERM")
        assert all(signal.getsignal(each) is signal.SIG_DFL for each in (1, 2, 15))
    assert signal.getsignal(signal.SIGINT) is before


HANGUPS = """
import signal, time
from qwen2_npu.conformance import children
stop = children.Stop()
with stop.listening():
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert stop.number == signal.SIGHUP
    assert all(signal.getsignal(each) is signal.SIG_DFL for each in (2, 15))
    print("one event", flush=True)
    stop._since -= children.ONE_HANGUP
    signal.raise_signal(signal.SIGHUP)
print("not reached")
"""


def test_a_terminal_that_closes_hangs_up_twice() -> None:
    """By its kernel and by its shell. A later one ends the process, as every second signal does."""
    done = subprocess.run([sys.executable, "-c", HANGUPS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGHUP, "one event\n"), done.stderr


def test_running_a_program_to_its_end(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd()); print(os.environ['OWN'], file=sys.stderr); sys.exit(3)"
    status, output = run_to_end([sys.executable, "-S", "-c", code], 60, tmp_path, {"OWN": "its own"})
    assert status == 3
    assert sorted(output) == sorted([str(tmp_path), "its own"])


def test_a_program_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    since, mark = time.monotonic(), f"mark of {tmp_path}"
    code = "import subprocess, sys; subprocess.run(['sh', '-c', 'sleep 120; true', sys.argv[1]])"
    status, _ = run_to_end([sys.executable, "-S", "-c", code, mark], 0.5)
    assert (status, time.monotonic() - since < GONE) == (None, True)
    assert not [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]
