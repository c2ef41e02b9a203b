"""The command of a job, why it cannot be started, and the one cause of its failure."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2_npu.parallel import job


@pytest.fixture
def with_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "is_installed", lambda: True)


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize(
    ("device", "cards", "reason"),
    [
        ("npu", 8, None),
        ("npu", 2, "needs 8 cards of this kind: npu has 2"),
        ("cuda", 0, "needs 8 cards of this kind: cuda has 0"),
        ("cpu", 0, None),
        ("npu:1", 8, "needs 8 cards: npu:1 is one; leave the number out"),
    ],
)
def test_why_not(device: str, cards: int, reason: str | None) -> None:
    assert job.why_not(device, 8, cards) == reason


def test_without_deepspeed_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "is_installed", lambda: False)
    reason = 'needs DeepSpeed, which starts 8 ranks and is not installed: pip install -e ".[deepspeed]"'
    assert job.why_not("npu", 8, 8) == reason


def test_two_jobs_have_two_ports() -> None:
    commands = [job.command("some.module", ["folder"], 8) for _ in range(2)]
    ports = {command[command.index("--master_port") + 1] for command in commands}
    assert len(ports) == 2
    assert commands[0][-3:] == ["--module", "some.module", "folder"]
    assert commands[0][commands[0].index("--num_gpus") + 1] == "8"


def test_deepspeed_is_told_the_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    assert job.environment("cpu")["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("output", "status", "cause"),
    [
        (["Traceback …", "error: the cause", "error: another"], 1, "the cause"),
        (["error: the cause"], None, "the cause"),
        (
            ["['python', '-m', 'module', '--local_rank=3', 'folder'] exits with return code = -9"],
            247,
            "rank 3 was killed by SIGKILL, perhaps for want of memory (see dmesg)",
        ),
        (["working"], None, "the ranks did not end within 9 s"),
        (["no module", ""], 1, "the ranks ended with status 1 and without a result: no module"),
        ([], 0, "the ranks ended with status 0 and without a result: no output"),
    ],
)
def test_cause(output: list[str], status: Any, cause: str) -> None:
    assert job.cause(output, status, 9) == cause
