"""Whatever goes wrong in one rank: all processes end, in the stated time, and one message says why."""

from __future__ import annotations

import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest

from qwen2_npu.parallel import monitor
from qwen2_npu.parallel.board import Board
from qwen2_npu.parallel.launch import Launch, PeerFailed, RankError
from qwen2_npu.parallel.monitor import Monitor
from tests.unit.parallel.job import BOTH, NO_DEEPSPEED, NO_NPU, free_port, run, script

TIMEOUT = 3

LAUNCHER = 6.0
"""Seconds that a launcher, and a busy machine, may need beside what docs/parallel.md states."""

GRACE = 3.0

MESSAGES = {
    "raises": "ValueError: this is the cause",
    "is killed": "rank {who} ended without a word: killed",
    "hangs": "rank {who} did not take part in a collective within 3 s",
    "is stopped": ("rank {who} is gone: killed, stopped", "rank {who} gave no sign of life for 3 s"),
}
"""What happens -> what is said. Of two, one."""


def check(done, what, who):
    assert done.status != 0
    assert not done.left
    assert done.took < (TIMEOUT + GRACE + LAUNCHER if what in ("hangs", "is stopped") else LAUNCHER)
    texts = MESSAGES[what] if isinstance(MESSAGES[what], tuple) else (MESSAGES[what],)
    said = [line for text in texts for line in done.lines(text.format(who=who))]
    # The launcher that sees a rank killed may end the others before they have said it.
    launcher = what == "is killed" and (
        "exitcode: -9" in done.errors or "return code = -9" in done.output + done.errors
    )
    assert len(said) == 1 or (launcher and not said), done.errors
    assert sum(line.endswith("Traceback (most recent call last):") for line in done.lines("[rank")) <= 2, done.errors
    ranks = {line.split("]")[0] for line in done.lines("[rank")}
    assert len(ranks) <= 1, f"more than one rank speaks: {done.errors}"


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", MESSAGES)
@pytest.mark.parametrize("launcher", BOTH)
def test_on_cpu(launcher, what, who, tmp_path):
    check(run(launcher, [script(tmp_path), what, str(who)], tmp_path, timeout=TIMEOUT), what, who)


@pytest.mark.slow
@NO_NPU
@pytest.mark.parametrize(
    ("launcher", "what", "who"),
    [
        ("torchrun", "raises", 0),
        ("torchrun", "hangs", 1),
        pytest.param("deepspeed", "is killed", 0, marks=NO_DEEPSPEED),
        pytest.param("deepspeed", "is stopped", 0, marks=NO_DEEPSPEED),
    ],
)
def test_on_emulated_cards(launcher, what, who, tmp_path):
    check(run(launcher, [script(tmp_path), what, str(who)], tmp_path, timeout=TIMEOUT, device="npu"), what, who)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BOTH)
def test_a_rank_that_ends_with_a_status_ends_the_job(launcher, tmp_path):
    done = run(launcher, [script(tmp_path), "ends", "1"], tmp_path)
    assert done.status in (1, 3)
    assert not done.left
    assert done.took < LAUNCHER
    assert not done.lines("[rank")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BOTH)
def test_ranks_end_with_their_launcher(launcher, tmp_path):
    done = run(launcher, [script(tmp_path), "kills its launcher", "1"], tmp_path, timeout=60)
    assert not done.left
    assert done.took < LAUNCHER
    assert done.lines("the launcher is gone") == ["error: the launcher is gone: it was killed"]


# ---- in one process -------------------------------------------------------------------------------------------------
class NoKeeper:
    dismissed = False

    def dismiss(self):
        self.dismissed = True


@pytest.fixture
def two(monkeypatch):
    """Monitors of two ranks in this process, which start no process and kill none."""
    monkeypatch.setattr(monitor, "Keeper", NoKeeper)
    monkeypatch.setattr(monitor, "_end_children", lambda: None)
    for name, seconds in (("LINGER", 0), ("GRACE", 0.05), ("BEAT", 0.02)):
        monkeypatch.setattr(monitor, name, seconds)
    port = free_port()
    launches = [Launch(rank, rank, 2, port=port, agent_store=bool(rank)) for rank in range(2)]
    found = [Monitor(each, Board.open(each, 1.0), 1.0) for each in launches]
    monkeypatch.setattr(Monitor, "_listen", lambda self: None)
    return found


COLLECTIVE = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed by peer")


def ends_with(one, error):
    with pytest.raises(BaseException) as caught, one:  # noqa: PT011
        raise error
    return caught.value


def test_the_cause_is_raised_as_it_is_and_the_others_are_quiet(two):
    first, second = two
    cause = ValueError("this is the cause")
    assert ends_with(second, cause) is cause
    for error in (COLLECTIVE, ValueError("of its own, later")):
        told = Monitor(first._launch, first._board, 1.0)
        told._board.come = lambda: None
        quiet = ends_with(told, error)
        assert isinstance(quiet, PeerFailed)
        assert isinstance(quiet, SystemExit)
        assert (quiet.code, quiet.reason) == (1, "rank 1 failed: this is the cause")


def test_only_a_rank_that_ends_in_order_keeps_what_it_has_started(two):
    first, second = two
    with first:
        pass
    ends_with(second, ValueError("this is the cause"))
    assert (first._keeper.dismissed, second._keeper.dismissed) == (True, False)


def test_of_two_that_fail_at_once_one_says_why(two, monkeypatch):
    first, second = two
    fail = first._board.fail
    monkeypatch.setattr(first._board, "fail", lambda reason: second._board.fail("a moment before") and fail(reason))
    quiet = ends_with(first, ValueError("of its own"))
    assert isinstance(quiet, PeerFailed)
    assert quiet.reason == "rank 1 failed: a moment before"


def test_who_is_to_blame_for_a_collective(two):
    first, _ = two
    first._board.tell("here")
    blamed = ends_with(first, COLLECTIVE)
    assert isinstance(blamed, RankError)
    assert str(blamed).startswith("rank 1 is gone: killed, stopped, or its node is down")


def test_a_rank_that_lives_and_does_other_work_is_to_blame(two, monkeypatch):
    first, _ = two
    beats = iter(range(100))
    monkeypatch.setattr(first._board, "beats", lambda rank: next(beats))
    assert str(ends_with(first, COLLECTIVE)).startswith("rank 1 did not take part in a collective within 1 s")


def test_a_collective_that_failed_everywhere_is_its_own_reason(two):
    first, second = two
    second._board.tell("hurt")
    assert str(ends_with(first, COLLECTIVE)).startswith("a collective failed: [/pytorch/third_party/gloo")
    assert second._board.told("hurt", 0), "the others must know, too"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_gone_is_said_to_be_killed(two, rank):
    two[rank]._neighbours = {1 - rank: None}
    assert str(ends_with(two[rank], COLLECTIVE)).startswith(f"rank {1 - rank} ended without a word: killed")


def test_a_status_is_a_reason(two):
    first, second = two
    assert ends_with(first, SystemExit(3)).code == 3
    assert second._board.failure() == "rank 0 failed: it ended with status 3"


def test_no_rank_leaves_before_the_work_of_all_is_done(two):
    first, second = two
    with pytest.raises(RankError, match=r"^rank 0 did not end within 1 s after rank 1 \(QWEN2_NPU_TIMEOUT\)"):
        second.work_is_done()
    first.work_is_done()  # the other one has said so before
    second.work_is_done()
    second.leave()  # does not wait for the one that keeps the store
    first.leave()


def test_a_rank_that_has_left_may_be_silent():
    """Rank 0 looks at all others, and they look at rank 0 alone."""
    port = free_port()
    boards = [Board.open(Launch(rank, rank, 3, port=port), 1.0) for rank in range(3)]
    watches = [Monitor(board._launch, board, -1.0) for board in boards]  # whoever is silent is so for too long
    heard = [{}, {}, {}]
    for board in boards:
        board.beat()
    assert [watch._silent(watch._board, each) for watch, each in zip(watches, heard, strict=True)] == [[], [], []]
    assert [watch._silent(watch._board, each) for watch, each in zip(watches, heard, strict=True)] == [[1, 2], [0], [0]]
    boards[1].tell("left")
    assert watches[0]._silent(boards[0], heard[0]) == [2]


def test_what_a_rank_has_started_ends_with_it_however_deep(monkeypatch):
    shell = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60; :'; :"])
    rank = psutil.Process(shell.pid)
    while len(found := rank.children(recursive=True)) < 2:
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "psutil", SimpleNamespace(Process=lambda: rank, Error=psutil.Error))
        monitor._end_children()
    assert shell.wait(5) == 0  # goes on without its children
    until = time.monotonic() + 5
    while not all(map(monitor._is_gone, found)) and time.monotonic() < until:
        time.sleep(0.01)
    assert all(map(monitor._is_gone, found))


def test_a_process_that_nobody_has_waited_for_is_gone():
    """Launchers look at their ranks now and then."""
    assert not monitor._is_gone(psutil.Process())
    child = subprocess.Popen(["true"])
    found, until = psutil.Process(child.pid), time.monotonic() + 5
    while found.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.01)
    assert monitor._is_gone(found)
    child.wait()
    assert monitor._is_gone(found)


@pytest.mark.parametrize(
    ("above", "count"),
    [
        (["python -m torch.distributed.run x", "bash", "torchrun"], 1),  # of another job, in which this one is started
        (["python -u -m deepspeed.launcher.launch", "/usr/bin/python /usr/bin/deepspeed --num_gpus 2", "sshd"], 2),
        (["bash", "torchrun"], 0),
        (["python train.py --with a launcher torchrun"], 0),
    ],
)
def test_launchers_are_the_processes_right_above(above, count, monkeypatch):
    parents = [SimpleNamespace(cmdline=line.split) for line in above]
    own = SimpleNamespace(parents=lambda: parents)
    monkeypatch.setattr(monitor, "psutil", SimpleNamespace(Process=lambda: own, Error=psutil.Error))
    assert monitor._launchers() == parents[:count]
