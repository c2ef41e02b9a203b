"""Ends every rank of a job when one fails, is killed, or lets the others wait too long; and one of them says why.

A launcher ends the ranks of its own node when one exits. What no launcher sees is seen here: a failure on another node,
a rank that hangs, and a launcher that was killed itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import PurePath
from types import TracebackType
from typing import NoReturn, Self

import psutil

from qwen2_npu.parallel.board import Board
from qwen2_npu.parallel.launch import LINGER, TIMEOUT_VARIABLE, Launch, PeerFailed, RankError, record_failure
from qwen2_npu.parallel.orphans import Keeper

BEAT = 1.0
"""Seconds between two signs of life."""

GRACE = 3.0
"""Seconds in which ranks whose collective failed find out which rank is to blame."""

OF_COLLECTIVES = ("gloo", "hccl", "hcom", "nccl", "processgroup")
"""Words in what torch and torch_npu say where a collective fails."""

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch")
"""Programs and modules that start ranks, and end with them."""


class Monitor:
    """A context manager: what is raised inside is told to the other ranks, and what they tell ends this one.

    Args:
        launch: this rank.
        board: what the ranks tell one another.
        timeout: seconds that they wait for one another.
    """

    def __init__(self, launch: Launch, board: Board, timeout: float) -> None:
        self._launch, self._board, self._timeout = launch, board, timeout
        self._others = [rank for rank in range(launch.world_size) if rank != launch.rank]
        self._neighbours: dict[int, psutil.Process | None] = {}
        self._ended, self._failing = threading.Event(), threading.Event()
        self._answered = time.monotonic()
        self._cause = ""
        self._left = False

    def __enter__(self) -> Self:
        self._board.come()
        self._keeper = Keeper()
        for watch in (self._listen, self._guard):
            threading.Thread(target=watch, name="qwen2_npu ranks", daemon=True).start()
        return self

    def wait_for_all(self) -> None:
        """Until every rank has come.

        Raises:
            RankError: one did not, in time.
        """
        missing = self._board.wait("here", self._others)
        if missing:
            raise RankError(
                f"{_ranks(missing)} did not come within {self._timeout:g} s ({TIMEOUT_VARIABLE}): see what it says, "
                f"and that {self._launch.world_size} ranks are started"
            )
        self._neighbours = self._board.processes(self._others)

    def work_is_done(self) -> None:
        """Until every rank has done its work: none closes connections that another one still uses.

        Raises:
            RankError: one has not, in time.
        """
        self._board.tell("done")
        self._must_end(self._board.wait("done", self._others))

    def leave(self) -> None:
        """This rank needs the others no more. Rank 0, which keeps the store, waits until that is so for all.

        Raises:
            RankError: one did not leave, in time.
        """
        self._left = self._launch.rank != 0
        self._board.tell("left")
        if self._launch.rank == 0:
            self._must_end(self._board.wait("left", self._others))

    def _must_end(self, missing: list[int]) -> None:
        if missing:
            raise RankError(
                f"{_ranks(missing)} did not end within {self._timeout:g} s after rank {self._launch.rank} "
                f"({TIMEOUT_VARIABLE}): it hangs, or does other work"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._failing.set()
                self._fail(error)
            self._keeper.dismiss()
        finally:
            self._ended.set()

    # ---- this rank failed -------------------------------------------------------------------------------------------
    def _fail(self, error: BaseException) -> NoReturn:
        """Tell the others, and raise what this rank has to say: ``error``, or that another one is to blame."""
        said, traceback = error, error.__traceback__
        try:
            if cause := self._hear():
                said = PeerFailed(cause)
            elif _of_collectives(error):
                said = self._blame(error)
            if not isinstance(said, PeerFailed) and 0 not in self._dead():
                if self._board.fail(_text(said)):
                    self._until_heard()
                else:
                    said = PeerFailed(self._hear())
        except RuntimeError:  # the store is gone
            if self._cause:
                said = PeerFailed(self._cause)
            elif _of_collectives(error):
                said = self._without_rank_0()
        if isinstance(said, PeerFailed):
            time.sleep(LINGER)
        _end_children()
        record_failure(said)
        if said is error:
            raise error.with_traceback(traceback)
        raise said from error

    def _blame(self, error: BaseException) -> BaseException:
        """Which rank made a collective fail: the one that does not report the same.

        Raises:
            RuntimeError: the store is gone.
        """
        time.sleep(BEAT / 10)  # a process that was killed takes a moment to be gone
        if dead := self._dead():
            return self._without_rank_0() if 0 in dead else RankError(_killed(dead))
        self._board.tell("hurt")
        before = {rank: self._board.beats(rank) for rank in self._others}
        until, missing = time.monotonic() + GRACE, self._others
        while missing and time.monotonic() < until:
            if cause := self._hear():
                return PeerFailed(cause)
            missing = [rank for rank in missing if not self._board.told("hurt", rank)]
            time.sleep(BEAT / 10)
        if gone := [rank for rank in missing if self._board.beats(rank) == before[rank]]:
            self._kill(gone)
            return RankError(f"{_ranks(gone)} is gone: killed, stopped, or its node is down")
        if missing:
            return RankError(
                f"{_ranks(missing)} did not take part in a collective within {self._timeout:g} s ({TIMEOUT_VARIABLE}): "
                "it hangs, or does other work"
            )
        return RankError(f"a collective failed: {_text(error)}")

    def _hear(self, board: Board | None = None) -> str:
        """Which rank failed first, and why; empty where none has. The others learn that this one knows."""
        if not self._cause and (cause := (board or self._board).failure()):
            (board or self._board).tell("heard")
            self._cause = cause
        return self._cause

    def _until_heard(self) -> None:
        """Where this rank keeps the store, it stays until the others know why it ends."""
        until = time.monotonic() + 2 * BEAT
        if self._launch.rank == 0 and not self._launch.agent_store:
            others = self._others
            while time.monotonic() < until and (
                others := [rank for rank in others if rank not in self._dead() and not self._board.told("heard", rank)]
            ):
                time.sleep(BEAT / 20)

    def _dead(self) -> list[int]:
        """Ranks on this node whose processes are gone."""
        return [rank for rank, process in self._neighbours.items() if process is None or _is_gone(process)]

    def _kill(self, ranks: list[int]) -> None:
        """Those on this node that give no sign of life: the launcher's SIGTERM does not reach a stopped process."""
        for process in [self._neighbours.get(rank) for rank in ranks]:
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def _without_rank_0(self) -> BaseException:
        """What to say where rank 0 is gone and the store with it: rank 1 says something."""
        if 0 in self._neighbours:
            until = time.monotonic() + BEAT
            while 0 not in self._dead() and time.monotonic() < until:  # a process takes a moment to be gone
                time.sleep(BEAT / 20)
        reason = _killed([0]) if 0 in self._dead() else "rank 0 is gone: killed, or its node is down"
        return RankError(reason) if self._launch.rank == 1 else PeerFailed(reason)

    # ---- in threads of their own ------------------------------------------------------------------------------------
    def _listen(self) -> None:
        """Give signs of life, and end this process where another rank failed, or gives none."""
        board = self._board.clone()
        heard: dict[int, tuple[int, float]] = {}
        while not self._ended.wait(BEAT) and not self._left:
            message, failed = "", 0 in self._dead()
            try:
                if not failed:
                    board.beat()
                    failed = bool(self._hear(board))
                    silent = self._silent(board, heard)
                    if silent and not failed and board.fail(message := _no_sign(silent, self._timeout)):
                        self._kill(silent)
                        self._end(message)
                    failed = failed or bool(silent)
                self._answered = time.monotonic()
            except RuntimeError:  # the store is gone
                failed = True
            if failed and not self._failing.is_set():
                if self._ended.wait(LINGER):  # the message comes first, and the launcher's signal
                    return
                self._end()

    def _silent(self, board: Board, heard: dict[int, tuple[int, float]]) -> list[int]:
        """Ranks that gave no sign of life in time. Rank 0 looks at the others, and they look at rank 0."""
        now, silent = time.monotonic(), []
        for rank in self._others if self._launch.rank == 0 else [0]:
            beats = board.beats(rank)
            if beats != heard.get(rank, (0, 0.0))[0]:
                heard[rank] = beats, now
            elif beats and now - heard[rank][1] > self._timeout and not board.told("left", rank):
                silent.append(rank)
        return silent

    def _guard(self) -> None:
        """End this process where nothing else can: the launcher is gone, or the store does not answer."""
        launchers = _launchers()
        while not self._ended.wait(BEAT):
            if any(_is_gone(launcher) for launcher in launchers):
                self._end("the launcher is gone: it was killed" if self._launch.local_rank == 0 else "")
            if time.monotonic() - self._answered > self._timeout + BEAT:
                self._kill([0])
                self._end(_no_sign([0], self._timeout) if self._launch.rank == 1 else "")

    def _end(self, message: str = "") -> NoReturn:
        """End this process, whatever its main thread waits for."""
        if message:
            sys.stderr.write(f"error: {message}\n")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        _end_children()
        os._exit(1)


def _text(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ended with status {error.code}"
    return " ".join(str(error).split()) or type(error).__name__


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _no_sign(ranks: list[int], timeout: float) -> str:
    return f"{_ranks(ranks)} gave no sign of life for {timeout:g} s ({TIMEOUT_VARIABLE}): stopped, or its node is down"


def _killed(ranks: list[int]) -> str:
    return f"{_ranks(ranks)} ended without a word: killed, perhaps for want of memory (see dmesg)"


def _of_collectives(error: BaseException) -> bool:
    """Whether ``error`` is of torch.distributed: another rank may be to blame."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in OF_COLLECTIVES)


def _launchers() -> list[psutil.Process]:
    """The processes above this one that end it when they end in order, and not when they are killed."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            names = {PurePath(part).name for part in process.cmdline()[:4]}
            if not names & set(LAUNCHERS):
                break
            found.append(process)
    return found


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end_children() -> None:
    """Kill all that this process has started."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
