"""What a launcher says in the environment, the device of a rank, and jobs in which all goes well."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel import agreement, board, launch, monitor
from qwen2_npu.parallel.launch import Launch, PeerFailed, joined
from tests.unit.parallel.job import BOTH, NO_DEEPSPEED, NO_NPU, free_port, run, script

TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "localhost"},
        {"MASTER_PORT": "29500"},
        dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE"), ""),
    ],
)
def test_where_nothing_is_launched(environment):
    assert Launch.of(environment) is None


def test_what_the_launchers_say():
    assert Launch.of(TWO) == Launch(1, 1, 2, None, "localhost", 29500)
    torchrun = {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "4"}
    assert Launch.of(TWO | torchrun) == Launch(1, 1, 2, 2, "localhost", 29500, True, 4)
    assert Launch.of(TWO | {"LOCAL_SIZE": "2"}).local_size == 2  # DeepSpeed
    assert Launch.of({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 0, 1)


@pytest.mark.parametrize("name", TWO)
def test_a_variable_that_is_missing_is_named(name):
    with pytest.raises(UnsupportedError, match=rf"^{name} is not set, and .*: start with `deepspeed .*or unset RANK"):
        Launch.of({key: value for key, value in TWO.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"), ("x", "-1", "1.0", "²")),
        ("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"),
        ("LOCAL_WORLD_SIZE", "1"), ("LOCAL_SIZE", "two"), ("TORCHELASTIC_RESTART_COUNT", "many"),
        ("WORLD_SIZE", "9" * 5000),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_named(name, value):
    with pytest.raises(UnsupportedError, match=rf"^{name}='{value}' must be an integer .*: start with"):
        Launch.of(TWO | {name: value})


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "soon", "1e6"])
def test_a_timeout_that_makes_no_sense_is_named(monkeypatch, value):
    monkeypatch.setenv(launch.TIMEOUT_VARIABLE, value)
    with pytest.raises(UnsupportedError, match=f"^QWEN2_NPU_TIMEOUT='{value}' must be a number of seconds from 1"):
        launch.timeout()


def test_the_timeout(monkeypatch):
    monkeypatch.delenv(launch.TIMEOUT_VARIABLE, raising=False)
    assert launch.timeout() == launch.TIMEOUT
    monkeypatch.setenv(launch.TIMEOUT_VARIABLE, "2.5")
    assert launch.timeout() == 2.5


def test_alone_there_is_a_group_of_one(monkeypatch):
    for name in launch.REQUIRED:
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as group:
        assert (group.rank, group.world_size, group.device, group.store) == (0, 1, torch.device("cpu"), None)
        assert launch.current() is group
        with joined() as inner:
            assert inner is group
        assert launch.current() is group
    assert launch.current() is None
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (None, ["work_is_done", "destroy", "leave", None]),
        (SystemExit(), ["work_is_done", "destroy", "leave", None]),
        (SystemExit(0), ["work_is_done", "destroy", "leave", None]),
        (SystemExit(3), [SystemExit]),
        (SystemExit("why"), [SystemExit]),
        (ValueError("why"), [ValueError]),
    ],
    ids=repr,
)
def test_a_rank_that_ends_with_a_status_has_not_done_its_work(end, expected, monkeypatch):
    """The others are told so, and it waits for none of them. What ends it is raised either way."""
    found: list[Any] = []

    class Watch:
        def __init__(self, *_: Any) -> None:
            self.wait_for_all = lambda: None
            self.work_is_done, self.leave = (partial(found.append, name) for name in ("work_is_done", "leave"))

        def __enter__(self) -> Watch:
            return self

        def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
            found.append(kind)

    monkeypatch.setattr(launch, "launched", lambda: Launch(0, 0, 2))
    monkeypatch.setattr(launch, "set_hccl_timeouts", lambda _: None)
    monkeypatch.setattr(monitor, "Monitor", Watch)
    monkeypatch.setattr(board.Board, "open", lambda *_: SimpleNamespace(part=lambda _: None))
    monkeypatch.setattr(agreement, "agree", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: found.append("destroy"))
    with contextlib.nullcontext() if end is None else pytest.raises(type(end)) as caught, joined("cpu"):
        if end is not None:
            raise end
    assert found == expected
    assert end is None or caught.value is end


def test_a_rank_and_its_card(monkeypatch, device):
    monkeypatch.setattr(launch, "LINGER", 0)
    two = Launch.of(TWO)
    assert launch.own_device(two, "cpu") == torch.device("cpu")
    with pytest.raises(UnsupportedError, match=r"^--device mps: several ranks run on npu, cuda, cpu"):
        launch.own_device(two, "mps", given_as="--device mps")
    with pytest.raises(UnsupportedError, match=r"^device='npu:1' is one card for 2 ranks: leave the number out"):
        launch.own_device(two, "npu:1")
    if device != "npu":
        pytest.skip("no cards here")
    assert launch.own_device(two, "npu") == torch.device("npu:1")
    assert torch.npu.current_device() == 1
    assert launch.own_device(Launch(18, 2, 24), "npu") == torch.device("npu:2")  # on the third of its nodes
    assert launch.own_device(Launch(0, 0, 1), "npu:3") == torch.device("npu:3")  # one rank may choose
    torch.npu.set_device(0)
    count = torch.npu.device_count()
    with pytest.raises(
        UnsupportedError, match=rf"^rank {count} needs npu:{count}, and there are {count} cards: start at"
    ):
        launch.own_device(Launch(count, count, count + 2), "npu")
    with pytest.raises(PeerFailed):  # says nothing
        launch.own_device(Launch(count + 1, count + 1, count + 2), "npu")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("npu", marks=NO_NPU)])
@pytest.mark.parametrize("launcher", BOTH)
def test_two_ranks(launcher, device, tmp_path):
    done = run(launcher, [script(tmp_path), "works", "-1"], tmp_path, device=device, timeout=60)
    assert (done.status, done.left) == (0, []), done.errors
    assert f"[3.0, 3.0] {device}" in done.output


@pytest.mark.slow
@NO_NPU
def test_more_ranks_than_cards(tmp_path):
    done = run("torchrun", [script(tmp_path), "works", "-1"], tmp_path, device="npu", ranks=3, cards=1, timeout=60)
    assert (done.status, done.left) == (1, [])
    (line,) = done.lines("there is 1 card")
    assert "rank 1 needs npu:1, and there is 1 card: start at most 1 per node" in line


@pytest.mark.slow
@NO_DEEPSPEED
def test_a_port_in_use(tmp_path):
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        done = run("deepspeed", [script(tmp_path), "works", "-1"], tmp_path, port=port, timeout=20)
    assert (done.status, done.left) == (1, [])
    assert done.took < 10
    (line,) = done.lines(f":{port} is in use; take another port (--master_port N)")
    assert "UnsupportedError" in line


@pytest.mark.slow
def test_a_rank_that_does_not_come(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(
        "import os, sys, time\n"
        "import qwen2_npu\n"
        "from qwen2_npu.parallel.launch import joined\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.sleep(1000)\n"
        "with joined('cpu'):\n"
        "    pass\n"
    )
    done = run("torchrun", [str(path)], tmp_path, timeout=2)
    assert (done.status, done.left) == (1, [])
    assert done.took < 12
    assert len(done.lines("rank 1 did not come within 2 s (QWEN2_NPU_TIMEOUT)")) == 1, done.errors


def test_a_free_port_is_one():
    assert 0 < free_port() < 65536


@pytest.mark.parametrize(
    ("seconds", "connect", "execute"), [(600, "599", "599"), (2, "120", "1"), (1e9, "7200", "17340")]
)
def test_timeouts_of_hccl(seconds: float, connect: str, execute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.HCCL_TIMEOUTS:
        monkeypatch.setenv(name, "")  # to be taken back
        monkeypatch.delenv(name)
    launch.set_hccl_timeouts(seconds)
    assert (os.environ["HCCL_CONNECT_TIMEOUT"], os.environ["HCCL_EXEC_TIMEOUT"]) == (connect, execute)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "7")
    launch.set_hccl_timeouts(seconds)
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "7", "the user's own"
