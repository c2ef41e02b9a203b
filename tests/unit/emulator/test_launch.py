"""Starting programs on emulated cards: their arguments, exit statuses, signals and children are their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwen2_npu.cli.emulate import command as cli
from qwen2_npu.emulator import environment, launch
from qwen2_npu.emulator.__main__ import main as module
from qwen2_npu.emulator.settings import VARIABLE, Settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None or bool(environment.signs_of_npu()),
    reason="there are no emulated cards here",
)

CLI = [sys.executable, "-m", "qwen2_npu.cli", "emulate"]
MODULE = [sys.executable, "-m", "qwen2_npu.emulator"]

TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('QWEN2_NPU_EMULATOR'), os.getpid()]))"


def run(command: list[str], timeout: int = 120, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (VARIABLE, environment.TOOLKIT_VARIABLE)}
    return subprocess.run(command, env={**clean, **more}, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("start", [[*CLI, "--", sys.executable], MODULE], ids=["cli", "module"])
def test_arguments_with_dashes_arrive(start, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text(TELL)
    words = ["--device", "npu", "-x", "--", "--soc", "two words", "", "*"]
    done = run([*start, str(script), *words])
    assert done.returncode == 0, done.stderr
    arguments, settings, _ = json.loads(done.stdout)
    assert arguments == words
    assert Settings.from_json(settings) == Settings()


@pytest.mark.parametrize(("start", "program"), [(CLI, ["--", sys.executable]), (MODULE, [])], ids=["cli", "module"])
def test_options_are_the_settings(start, program):
    done = run([*start, "--device-count", "3", "--hbm-gib", "1.5", *program, "-c", TELL])
    assert Settings.from_json(json.loads(done.stdout)[1]) == Settings(device_count=3, hbm_bytes=3 << 29), done.stderr


def test_an_outer_launcher_s_settings_are_the_defaults():
    outer = [*MODULE, "--soc", "Ascend910B1", "-c"]
    inner = f"import subprocess, sys; sys.exit(subprocess.call({[*MODULE, '--device-count', '2', '-c', TELL]!r}))"
    done = run([*outer, inner])
    assert Settings.from_json(json.loads(done.stdout)[1]) == Settings(soc="Ascend910B1", device_count=2)


@pytest.mark.parametrize("start", [[*CLI, "--", sys.executable], MODULE], ids=["cli", "module"])
def test_exit_statuses_are_the_program_s(start):
    assert run([*start, "-c", "import sys; sys.exit(7)"]).returncode == 7
    assert run([*start, "-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -signal.SIGKILL


def test_signals_reach_the_program_itself(tmp_path):
    code = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(42))\n"
    code += f"open({str(tmp_path / 'ready')!r}, 'w').close()\ntime.sleep(60)"
    process = subprocess.Popen([*CLI, "--", sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 42


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [("no-such-program", 127, "no-such-program: no such program"), (str(Path(__file__)), 126, "cannot be run")],
)
def test_programs_that_cannot_be_started(program, status, message):
    done = run([*CLI, "--", program])
    assert (done.returncode, message in done.stderr) == (status, True), done.stderr


def test_wrong_settings_are_one_line():
    done = run([*CLI, "--cann", "newest", "--", "true"])
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: cann='newest' is not a version of CANN; one looks like 8.5.0"]


@pytest.fixture
def stays(monkeypatch):
    """Nothing takes the place of this process, whatever a test lets through."""
    monkeypatch.setattr(os, "execvpe", lambda *arguments: pytest.fail("the program was started"))


@pytest.mark.usefixtures("stays")
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "0", "-1", "1e300", "8589934592", "1e-10"])
def test_memory_that_no_card_has(text):
    for command in (cli, module):
        done = CliRunner().invoke(command, [f"--hbm-gib={text}", "--", "true"])
        assert done.exit_code == 2, done.exception
        assert done.output.startswith(f"error: --hbm-gib {float(text)} must be the memory of a card in GiB")
        assert len(done.output.splitlines()) == 1


@pytest.mark.usefixtures("stays")
@pytest.mark.parametrize("text", ["0x10", "", "two", "1,5"])
def test_memory_that_is_no_number(text):
    done = CliRunner().invoke(cli, [f"--hbm-gib={text}", "--", "true"])
    assert done.exit_code == 2
    assert f"'{text}' is not a valid float" in done.output


def test_small_and_large_memory():
    assert launch.settings_of(None, None, 2**-30, None).hbm_bytes == 1
    assert launch.settings_of(None, None, 2**32, None).hbm_bytes == 1 << 62


@pytest.mark.usefixtures("stays")
def test_announced_settings_that_cannot_be_read_are_one_line():
    done = CliRunner().invoke(cli, ["--", "true"], env={VARIABLE: "[" * 100_000})
    assert done.exit_code == 2, done.exception
    assert done.output.startswith(f"error: {VARIABLE}='[[[")
    assert len(done.output.splitlines()) == 1


@pytest.mark.usefixtures("stays")
def test_a_cache_that_cannot_be_used_is_not_taken_for_the_program(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli, ["--", "true"], env={"QWEN2_NPU_CACHE": str(tmp_path / "file" / "cache")})
    assert done.exit_code == 2, done.exception
    assert done.output.startswith("error: no folder to build the emulator's libraries in")


def test_beside_a_real_cann_it_refuses(tmp_path):
    for start in ([*CLI, "--", "true"], [*MODULE, "-c", "pass"]):
        done = run(start, ASCEND_HOME_PATH=str(tmp_path))
        assert done.returncode == 2
        assert f"error: a real CANN or NPU is here ({tmp_path})" in done.stderr


@pytest.mark.parametrize("flag", ["-E", "-I", "-S"])
def test_pythons_that_do_not_read_their_environment(flag):
    done = run([sys.executable, flag, "-m", "qwen2_npu.emulator", "-c", "pass"])
    assert done.returncode != 0


def test_help_says_how():
    done = run([*MODULE, "--help"])
    assert done.returncode == 0
    assert "--hbm-gib" in done.stdout
    assert run(MODULE).returncode == 2


@pytest.mark.slow
def test_children_of_torchrun(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "rank = int(os.environ['LOCAL_RANK'])\n"
        "torch.npu.set_device(rank)\n"
        "dist.init_process_group('hccl')\n"
        "x = torch.full((4,), float(rank + 1), device='npu')\n"
        "dist.all_reduce(x)\n"
        "assert x.tolist() == [3.0] * 4 and x.device.index == rank, x\n"
        "dist.destroy_process_group()\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(' '.join(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*CLI, "--device-count", "2", "--", *torchrun, str(script), "--flag"], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["--flag"] * 2


# What DeepSpeed 0.19 does when it builds its operators for an NPU.
LOOKS_FOR_CANN = """
import os, subprocess, sys
import torch
assert torch.npu.is_available()
assert os.path.isdir(os.environ["ASCEND_HOME_PATH"])
print(float(torch.ones(2, device="npu").sum()))
sys.stdout.flush()
if "child" in sys.argv:
    sys.exit(subprocess.call([*sys.argv[2:], __file__]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "inherited", [{}, {"ASCEND_HOME_PATH": "/no/such/folder"}], ids=["unset", "a folder that is gone"]
)
def test_programs_that_ask_for_cann_s_folder_and_their_children(inherited, tmp_path):
    script = tmp_path / "looks.py"
    script.write_text(LOOKS_FOR_CANN)
    # The child starts the emulator's launcher itself, with the variable that its parent has set.
    done = run([*MODULE, str(script), "child", *MODULE], **inherited)
    assert (done.returncode, done.stdout.split()) == (0, ["2.0", "2.0"]), done.stderr[-3000:]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_on_two_cards(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, torch, deepspeed, torch.distributed as dist\n"
        "deepspeed.init_distributed('hccl')\n"
        "rank = dist.get_rank()\n"
        "torch.npu.set_device(rank)\n"
        "x = torch.full((4,), float(rank + 1), device='npu')\n"
        "dist.all_reduce(x)\n"
        "assert x.tolist() == [3.0] * 4 and x.device.index == rank, x\n"
        "dist.destroy_process_group()\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').close()\n"
    )
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    done = run([*CLI, "--device-count", "2", "--", *launcher, str(script)], timeout=400, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / str(rank)).exists() for rank in range(2))
