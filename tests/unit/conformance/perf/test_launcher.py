"""Ranks in processes of their own: what they hand back, and everything that must not pass for it.

Nothing here is a latency of anything: ranks are stand-ins (tests/perf/standin_rank.py) that tell theirs.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen2_npu.conformance.perf import launcher, processes
from qwen2_npu.conformance.perf.documented import BaselineError
from qwen2_npu.conformance.perf.fingerprint import Fingerprint
from qwen2_npu.conformance.perf.job import FAILURES, RESULT, Job, Status, Ticket
from qwen2_npu.conformance.perf.launcher import LaunchError, launch, read_result
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.recorded import Recorded
from qwen2_npu.conformance.perf.rows import Configuration, Row
from tests.perf import standin_rank
from tests.perf.standin_rank import DECODE_MS, PREFILL_MS, worker_of

TWO = Job(Configuration("72B", 2, 4, "graph", "fused_qkv"), "cpu", input_tokens=8, decode_steps=3)
TOLD = Measurement(PREFILL_MS, (DECODE_MS,) * 3, (), (0, 8, 9, 10), input_tokens=8, asked_steps=3, self_test=True)
PATIENCE = 120.0
"""Seconds that a launch which ends by itself may take on a busy machine."""


def left(folder: Path, wait: float = 10.0) -> list[str]:
    """Command lines of launches' processes below ``folder`` that still run after ``wait`` seconds."""
    deadline = time.monotonic() + wait
    while found := [text for process in psutil.process_iter() if (text := _runs_below(folder, process))]:
        if time.monotonic() > deadline:
            return found
        time.sleep(0.05)
    return []


def _runs_below(folder: Path, process: psutil.Process) -> str:
    """The process's command line if it has ``folder`` in it or runs there; else empty."""
    try:
        line, where = " ".join(process.cmdline()), process.cwd()
        return line if f"{folder}/" in line or where.startswith(f"{folder}/") else ""
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # zombies have neither
        return ""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where launches make theirs; afterwards no process of theirs is left."""
    yield tmp_path
    assert left(tmp_path) == []


def test_a_process_that_is_left_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path / "launch") as sleeping:
        assert left(tmp_path, wait=0.0) == ["sleep 600"]
        sleeping.kill()
    assert left(tmp_path, wait=0.0) == []


def failure(folder: Path, behaviour: str, **settings: Any) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        launch(TWO, worker=worker_of(behaviour), folder=folder, **{"limit": PATIENCE, **settings})
    return caught.value


# ---- what comes back ------------------------------------------------------------------------------------------------
def test_two_ranks_meet_and_rank_0_hands_back_the_slowest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over gloo, in processes: rank 1 comes late to the first step alone; its steps show 2 ms, rank 0's 1 ms."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # no device is needed, and importing one takes a second
    found = launch(TWO, worker=worker_of("meets"), limit=PATIENCE, folder=folder)
    assert found == replace(TOLD, prefill_ms=2.0, decode_ms=(2.0,) * 3)
    assert list(folder.glob("qwen2-npu-launch-*")) == []  # nothing is left of a launch that went well
    fingerprint = Fingerprint({"device": "cpu", "verified": "cpu"})
    with pytest.raises(BaselineError, match="a self-test's latencies are injected and are never recorded"):
        Recorded(tmp_path, fingerprint).record(Row("72b", TWO.configuration, "decode"), found, "no", {})


@pytest.mark.slow
def test_the_protocol_on_two_ranks(folder: Path) -> None:
    """The worker's own way to measure, with a model that is whole on every rank and sums over both."""
    found = launch(TWO, worker=worker_of("measures"), limit=PATIENCE, folder=folder)
    assert replace(found, warnings=()).faults() == []
    assert (found.contexts, len(found.decode_ms), found.self_test) == ((0, 8, 9, 10), 3, True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")
def test_the_protocol_on_two_npus(folder: Path) -> None:
    """Emulated ones where there are no others: HCCL, events, and the memory of every card."""
    found = launch(replace(TWO, device="npu"), worker=worker_of("measures"), limit=PATIENCE, folder=folder)
    assert replace(found, warnings=()).faults() == []
    assert len(found.wall_ms) == 4
    assert found.peak_bytes is not None


@pytest.mark.slow
def test_a_live_rank_needs_tensor_parallel(folder: Path) -> None:
    """Nobody starts one today (see laboratory.why_not); what it would say if somebody did."""
    with pytest.raises(LaunchError) as caught:
        launch(TWO, limit=PATIENCE, folder=folder)
    said = "failed at 'building the model': UnsupportedError: needs tensor parallel: 72B runs on 2 cards"
    assert said in caught.value.reason
    assert "tensor_parallel.py" in caught.value.log


# ---- ranks that fail ------------------------------------------------------------------------------------------------
def test_a_rank_that_dies_is_named(folder: Path) -> None:
    """And so is nobody else: the agent ends rank 0, which waits. A child that rank 1 leaves behind goes, too."""
    error = failure(folder, "loses_a_child")
    assert error.reason == "rank 1 of 2 was killed by SIGKILL at 'measuring'"
    assert error.log.endswith("rank 1 is about to act")


def test_a_rank_that_hangs_is_named_with_its_stack(folder: Path) -> None:
    error = failure(folder, "hangs", limit=1.0)
    assert error.reason == "rank 1 of 2 did not finish within 1 s: at 'measuring'; rank 0 at 'handing in'"
    assert "rank 1 is about to act" in error.log
    assert "most recent call first" in error.log
    assert standin_rank.__file__ in error.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raises", "rank 1 of 2 failed at 'measuring': RuntimeError: the card is on fire"),
        ("exits", "rank 1 of 2 ended with status 3 at 'measuring'"),
        ("too_few_steps", "rank 1 of 2 failed at 'handing in': ValueError: 2 decode steps of 3 asked for"),
        ("no_result", "2 ranks ended well, but rank 0 wrote no result"),
        ("truncated", "is damaged: JSONDecodeError"),
        ("old", "is an old one, of launch 0123456789abcdef"),
        ("of_another_batch", "is of other arguments: batch: 4 asked, 8 measured"),
        ("of_more_ranks", "is of 3 ranks"),
    ],
)
def test_every_other_way_to_fail(behaviour: str, reason: str, folder: Path) -> None:
    assert reason in failure(folder, behaviour).reason


@pytest.mark.slow
def test_no_process_is_left_when_a_rank_with_a_child_hangs(folder: Path) -> None:
    assert "did not finish within 1 s" in failure(folder, "hangs_with_a_child", limit=1.0).reason


@pytest.mark.slow
def test_an_agent_that_does_not_listen_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    assert "did not finish within 1 s" in failure(folder, "hangs", limit=1.0).reason


@pytest.mark.slow
def test_ranks_that_do_not_start_are_named_and_a_worker_that_cannot_is_shown(folder: Path) -> None:
    error = failure(folder, "hangs", start=0.0)
    assert error.reason == "ranks 0, 1 of 2 did not start within 0 s"
    with pytest.raises(LaunchError) as caught:
        launch(TWO, worker=("-m", "qwen2_npu.no_such_module"), limit=PATIENCE, folder=folder)
    assert "of 2 ended with status 1 before its first line" in caught.value.reason
    assert "no_such_module" in caught.value.log


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_one_who_asked(number: signal.Signals, folder: Path) -> None:
    """The launching process is killed while its ranks run, as nightly does with a suite that takes too long."""
    code = (
        "from pathlib import Path; from tests.unit.conformance.perf import test_launcher as t\n"
        f"t.launch(t.TWO, worker=t.worker_of('hangs'), folder=Path({str(folder)!r}))"
    )
    root = Path(__file__).parents[4]
    asking = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while len(pids := [json.loads(path.read_text())["pid"] for path in folder.glob("*/status-*.json")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(psutil.pid_exists(pid) for pid in pids)
    asking.send_signal(number)
    asking.wait()
    assert left(folder) == []


# ---- what is read, without processes --------------------------------------------------------------------------------
TICKET = Ticket("this", TWO)


def test_the_result_of_this_very_launch_is_taken(tmp_path: Path) -> None:
    TICKET.write_result(tmp_path, 2, TOLD)
    assert read_result(tmp_path, TICKET) == TOLD


def _changed(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        TICKET.write_result(folder, 2, TOLD)
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        (folder / RESULT).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return write


def _measurement(**changes: Any) -> Callable[[Path], None]:
    return _changed(measurement={**TOLD.to_json(), **changes})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda folder: None, "rank 0 wrote no result"),
        (lambda folder: standin_rank.truncated(folder, TICKET, 2, TOLD), "is damaged: JSONDecodeError"),
        (lambda folder: (folder / RESULT).touch(), "is damaged: JSONDecodeError"),
        (_changed(measurement={}), "is damaged: TypeError"),
        (_changed(measurement=None), "is damaged: TypeError"),
        (_changed(job=None), "is damaged: TypeError"),
        (_measurement(new_field=1), "is damaged: TypeError"),
        (_measurement(decode_ms=["10", "10", "10"]), "is damaged: TypeError: a latency that is no number"),
        (lambda folder: standin_rank.old(folder, TICKET, 2, TOLD), "is an old one, of launch 0123456789abcdef"),
        (lambda folder: standin_rank.of_more_ranks(folder, TICKET, 2, TOLD), "is of 3 ranks"),
        (lambda folder: standin_rank.of_another_batch(folder, TICKET, 2, TOLD), "batch: 4 asked, 8 measured"),
        (_changed(job={**TWO.to_json(), "seed": 5}), "is of other arguments: seed: 0 asked, 5 measured"),
        (_measurement(input_tokens=9), "is of other arguments: input_tokens: 8 asked, 9 measured"),
        (_measurement(asked_steps=2), "is of other arguments: decode_steps: 3 asked, 2 measured"),
        (_measurement(weights="qwen"), "is of other arguments: weights: random asked, qwen measured"),
    ],
)
def test_any_other_result_is_refused(write: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(LaunchError, match="2 ranks ended well, but") as caught:
        read_result(tmp_path, TICKET)
    assert reason in caught.value.reason


def who_failed(folder: Path, ended: list[tuple[int, int]], said: dict[int, tuple[str | None, float]]) -> str:
    (folder / FAILURES).write_text(json.dumps([{"rank": rank, "exitcode": code} for rank, code in ended]))
    for rank, (error, seconds) in said.items():
        Status(rank, 1, "measuring", error, seconds).write(folder)
    return launcher._who_failed(1, 4, folder).reason


def test_who_misses_a_rank_is_not_the_one_that_failed(tmp_path: Path) -> None:
    """Rank 2 was killed by the kernel; rank 0 found it gone and said so, in the same moment for the agent."""
    said: dict[int, tuple[str | None, float]] = {0: ("RuntimeError: peer closed", 1.0), 1: (None, 0.0), 2: (None, 0.0)}
    reason = who_failed(tmp_path, [(0, 1), (2, -9), (1, -15)], said)
    lost = "rank 0 failed at 'measuring': RuntimeError: peer closed"
    assert reason == f"rank 2 of 4 was killed by SIGKILL at 'measuring'; {lost}"


def test_the_first_to_speak_failed_first(tmp_path: Path) -> None:
    said: dict[int, tuple[str | None, float]] = {0: ("B", 2.0), 1: ("B", 3.0), 3: ("A", 1.0)}
    reason = who_failed(tmp_path, [(0, 1), (1, 1), (3, -15)], said)
    assert reason == "rank 3 of 4 failed at 'measuring': A; ranks 0, 1 failed at 'measuring': B"


def test_an_agent_that_ends_before_its_ranks_is_shown(tmp_path: Path) -> None:
    (tmp_path / launcher.AGENT_LOG).write_text("ImportError: no torch\n")
    error = launcher._who_failed(-9, 4, tmp_path)
    assert error.reason == "the agent of 4 ranks was killed by SIGKILL before its ranks did"
    assert error.log.endswith("ImportError: no torch")
