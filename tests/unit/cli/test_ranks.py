"""Commands that a launcher starts once per card: one of them speaks, and all of them were given the same."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from qwen2_npu.cli import COMMANDS, main, ranks
from qwen2_npu.parallel import agreement, launch
from tests.unit.parallel.job import BOTH, NO_NPU, run

SECOND = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
GENERATE = ["-m", "qwen2_npu", "generate", "--prompt", "The cat", "--max-new-tokens", "4"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody waits for a launcher to end them; nor does a launcher's own environment count."""
    monkeypatch.setattr(launch, "LINGER", 0)
    for name in (*launch.REQUIRED, *launch.ALSO_REQUIRED):
        monkeypatch.delenv(name, raising=False)


def test_the_launchers_argument_is_accepted():
    for name in ("--local_rank=1", "--local-rank=1"):
        done = CliRunner().invoke(main, [name, "baselines", "--help"])
        assert done.exit_code == 0, done.output
    assert "local_rank" not in CliRunner().invoke(main, ["--help"]).output


@pytest.mark.parametrize("command", ranks.IN_ONE_PROCESS)
def test_commands_of_one_process_say_so(command):
    done = CliRunner().invoke(main, [command], env=SECOND)
    assert done.exit_code == 2
    assert f"{command} runs in one process: start it without 2 ranks" in done.output


def test_every_command_either_runs_in_ranks_or_says_that_it_does_not():
    from qwen2_npu.cli import bench, generate, verify

    for module in (bench, generate, verify):
        assert module.command.callback.__wrapped__ is not None
    assert {*ranks.IN_ONE_PROCESS, "bench", "generate", "verify", "emulate"} == set(COMMANDS)


def test_a_launch_that_makes_no_sense_is_one_line():
    done = CliRunner().invoke(main, ["generate", "--prompt", "a"], env={"RANK": "0", "WORLD_SIZE": "two"})
    assert done.exit_code == 2
    assert done.output.startswith("error: WORLD_SIZE='two' must be an integer of at least 1: start with `deepspeed")
    assert len(done.output.splitlines()) == 1


def test_only_the_first_rank_writes(monkeypatch):
    assert ranks.first()
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    assert not ranks.first()
    monkeypatch.setenv("RANK", "0")
    assert ranks.first()


def test_other_ranks_leave_errors_before_the_meeting_to_the_first(monkeypatch):
    waited = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    done = CliRunner().invoke(main, ["generate", "--prompt", ""], env={})
    assert (done.exit_code, waited) == (2, [])
    done = CliRunner().invoke(main, ["generate"], env=SECOND)
    assert (done.exit_code, waited) == (2, [launch.LINGER])
    assert "Missing option" in done.output  # its own, where nobody has ended it


def test_a_command_alone_gets_what_it_was_given():
    seen = []

    @ranks.in_ranks
    def command(device: str | None, number: int) -> None:
        seen.append((device, number))

    command(device=None, number=3)
    command(device="cpu", number=4)
    assert seen == [(None, 3), ("cpu", 4)]
    assert click.get_current_context(silent=True) is None


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_ranks_agree_on_options_checkpoint_and_status(status, rank, readable, monkeypatch, tmp_path):
    """On all of them, whatever one of them cannot read: who does not ask leaves the others waiting."""
    said = []

    def fingerprint(folder):
        if not readable:
            raise OSError
        return {"files": str(folder)}

    monkeypatch.setattr(ranks, "_met", False)
    monkeypatch.setattr(launch, "launched", lambda: SimpleNamespace(world_size=2, rank=rank))
    group = SimpleNamespace(device="npu:1", rank=rank)
    monkeypatch.setattr(launch, "joined", lambda device, given_as: nullcontext(group))
    monkeypatch.setattr(agreement, "agree", lambda what, way_out="": said.append(what))
    monkeypatch.setattr(agreement, "fingerprint", fingerprint)

    @ranks.in_ranks
    def command(device: str, steps: tuple[str, ...], model_path: Path) -> None:
        assert device == "npu:1"
        sys.exit(status)

    with pytest.raises(SystemExit) as end:
        command(device="cpu", steps=("a", "b"), model_path=tmp_path)
    assert end.value.code == (status if rank == 0 else 0)
    options = {"--device": "cpu", "--steps": ["a", "b"], "--model-path": str(tmp_path)}
    assert said == [options, {"files": str(tmp_path)} if readable else {}, {"exit status": status}]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BOTH)
@pytest.mark.parametrize("device", ["cpu", pytest.param("npu", marks=NO_NPU)])
def test_generate_in_two_ranks(launcher, device, tmp_path):
    done = run(launcher, [*GENERATE, "--device", device], tmp_path, device=device, timeout=60)
    assert (done.status, done.left) == (0, []), done.errors
    assert done.output.count("The cat") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BOTH)
def test_what_is_wrong_in_all_ranks_is_said_once(launcher, tmp_path):
    done = run(launcher, [*GENERATE, "--device", "cpu", "--model-path", "/no/such/folder"], tmp_path, timeout=60)
    assert done.status in (1, 2)
    assert not done.left
    assert len(done.lines("error: model path '/no/such/folder'")) == 1
    done = run(launcher, GENERATE[:3], tmp_path)
    assert done.status in (1, 2)
    assert len(done.lines("Error: Missing option '--prompt'")) == 1


@pytest.mark.slow
def test_verify_writes_one_report(tmp_path):
    path = tmp_path / "verify.json"
    verify = ["-m", "qwen2_npu", "verify", "--device", "cpu", "--steps", "swiglu", "--json", str(path)]
    done = run("torchrun", verify, tmp_path, timeout=60)
    assert done.status == 0, done.errors
    assert json.loads(path.read_text())
    assert done.output.count("passed") == 1


@pytest.mark.slow
def test_different_options_are_refused_once(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(
        "import os, sys\n"
        "from qwen2_npu.cli import main\n"
        "main(['generate', '--device', 'cpu', '--prompt', 'The cat', '--seed', os.environ['RANK']])\n"
    )
    done = run("torchrun", [str(path)], tmp_path, timeout=60)
    assert done.status == 1
    assert done.lines("has --seed") == ["error: rank 1 has --seed 1, rank 0 has 0: give all ranks the same"]
