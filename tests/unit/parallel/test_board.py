"""What ranks tell one another, and the ports where they cannot."""

from __future__ import annotations

import os
import socket
import threading
import time

import psutil
import pytest

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.board import Board
from qwen2_npu.parallel.launch import Launch, RankError
from tests.unit.parallel.job import free_port


def boards(ranks: int = 2) -> list[Board]:
    port = free_port()
    return [Board.open(Launch(rank, rank, ranks, port=port), 1.0) for rank in range(ranks)]


def test_what_one_rank_says_the_others_hear():
    first, second = boards()
    for board in (first, second):
        board.come()
    assert first.wait("here", [0, 1]) == []
    assert second.processes([0]) == {0: psutil.Process(os.getpid())}
    second.tell("left")
    assert first.told("left", 1)
    assert not first.told("left", 0)
    second.beat()
    assert (first.beats(1), first.beats(0)) == (1, 0)
    second.clone().beat()
    assert first.beats(1) == 2


def test_a_clone_is_heard_while_its_board_waits():
    """Signs of life go on while the main thread waits for a key."""
    first, second = boards()
    clone = second.clone()
    waiting = threading.Thread(target=second._root.get, args=("key",))
    waiting.start()
    time.sleep(0.05)
    begin = time.monotonic()
    clone.beat()
    assert time.monotonic() - begin < 0.5
    first._root.set("key", "")
    waiting.join()


def test_ranks_on_other_nodes_are_no_processes_of_this_one(monkeypatch):
    """Whose numbers may be those of others here."""
    first, second = boards()
    first.come()
    monkeypatch.setattr(socket, "gethostname", lambda: "another node")
    second.come()
    assert list(second.processes([0, 1])) == [1]


def test_the_first_failure_is_the_cause():
    first, second = boards()
    assert first.failure() == ""
    assert second.fail("no memory")
    assert not first.fail("the connection was closed")
    assert first.failure() == second.failure() == "rank 1 failed: no memory"


def test_who_has_not_come():
    first, second = boards()
    second.come()
    first._timeout = 0.05
    assert first.wait("here", [0, 1]) == [0]


def test_a_port_in_use():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with pytest.raises(UnsupportedError, match=rf"^MASTER_PORT: 127.0.0.1:{port} is in use; take another port"):
            Board.open(Launch(0, 0, 2, port=port), 1.0)


def test_the_port_of_another_job():
    first, second = boards()
    first.come()
    second.come()
    other = Board.open(Launch(1, 1, 2, port=first._launch.port), 1.0)
    with pytest.raises(UnsupportedError, match=r"another job meets at .*; take another port"):
        other.come()
    again = Board.open(Launch(1, 1, 2, port=first._launch.port, attempt=1), 1.0)
    again.come()  # a restart by torchrun is no other job


def test_rank_0_that_does_not_come():
    with pytest.raises(RankError, match=r"^rank 0 did not come to 127.0.0.1:\d+ within 1 s \(QWEN2_NPU_TIMEOUT\): "):
        Board.open(Launch(1, 1, 2, port=free_port()), 1.0)
