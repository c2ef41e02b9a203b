"""The commands as a user meets them: exit status, one clear line for bad input, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from qwen2_npu import Qwen2ForCausalLM, emulator
from qwen2_npu.cli import CLOSED_PIPE, COMMANDS, main
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.report import own_files
from qwen2_npu.optimizations import MODES, MODES_OF
from tests.accuracy.faults import FAULTS
from tests.unit.small import small_stock


def small_folder(path: Path) -> Path:
    small_stock().save_pretrained(path, safe_serialization=True)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_of_every_command() -> None:
    assert all(name in run("--help").output for name in COMMANDS)
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_start_up_imports_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from qwen2_npu.cli import main; "
        "CliRunner().invoke(main, ['verify', '--help']); sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verify_passes_on_the_tiny_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "report" / "verify.json"
    result = run("verify", "--json", path, "--steps", "fixed_kv_cache,swiglu")
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text(encoding="utf-8"))["environment"]["verified"] in " ".join(result.output.split())
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"]
    assert [row["step"] for row in report["rows"]] == ["fixed_kv_cache", "swiglu"]
    assert all(row["positions"] > 200 for row in report["rows"])
    assert len(report["samples"]) == 4
    assert report["perplexity"]["baseline"] < 20


def test_verify_without_a_tokenizer(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "model")
    result = run("verify", "--model-path", folder, "--json", tmp_path / "verify.json", "--steps", "swiglu")
    assert result.exit_code == 0, result.output


def test_verify_again_after_a_night(tmp_path: Path) -> None:
    """As the documentation says: its file stays that night's, or the next one would be refused."""
    folder = small_folder(tmp_path / "model")
    path = tmp_path / "report" / "verify.json"
    with own_files.locked(path.parent) as own:
        own.start([path.name])
        path.write_text("of the night", encoding="utf-8")
        own.finish()
    assert run("verify", "--model-path", folder, "--json", path, "--steps", "fixed_kv_cache").exit_code == 0
    assert json.loads(path.read_text(encoding="utf-8"))["passed"]
    with own_files.locked(path.parent) as own:
        own.start([path.name])
    assert not path.exists()


@pytest.mark.parametrize("tiny_checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_verify_fails_on_a_fault_and_says_where(tiny_checkpoint: bool, tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "rope_halves_swapped")
    path = tmp_path / "verify.json"
    model = () if tiny_checkpoint else ("--model-path", small_folder(tmp_path / "model"))
    with fault.active():
        result = run("verify", "--json", path, "--steps", "flash_attention", *model)
    assert result.exit_code == 1
    report = json.loads(path.read_text(encoding="utf-8"))
    assert not report["passed"]
    assert "step flash_attention, layer 0, query" in report["rows"][0]["explanation"]
    assert "step flash_attention" in " ".join(result.output.split())


def test_nan_weights_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    model = small_stock()
    model.state_dict()[name][0, :3] = float("nan")
    folder = tmp_path / "model"
    model.save_pretrained(folder, safe_serialization=True)
    result = run("verify", "--model-path", folder, "--json", tmp_path / "verify.json")
    assert result.exit_code == 2
    assert f"tensor {name} has 3 NaN" in " ".join(result.output.split())
    assert not (tmp_path / "verify.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--model-path", "/no/such/folder"], "'/no/such/folder' is not a folder"),
        (["verify", "--device", "abacus"], "--device abacus: not usable here"),
        (["verify", "--steps", "warp_drive"], "no step warp_drive"),
        (["verify", "--dtype", "int8"], "int8"),
        (["verify", "--json", "/"], "/ is a folder: name a file in it"),
        (["generate", "--prompt", ""], "--prompt is empty"),
        (["generate", "--prompt", "x", "--top-k", "5"], "--top-k needs --sample"),
        (["generate", "--prompt", "x", "--max-new-tokens", "100000"], "max_position_embeddings=2048"),
        (["generate", "--model-path", "/no/such/folder", "--prompt", "x"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


WRONG_MODES = [(mode, kind) for kind in ("cpu", "npu") for mode in MODES if mode not in MODES_OF[kind]]


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "x"),
        ("verify",),
        ("bench", "--model-path", str(tiny.path()), "--input-len", "8", "--output-len", "4"),
        ("bench", "--random-weights", "0.5B", "--steps", "swiglu", "--input-len", "8", "--output-len", "4"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("mode", "kind"), WRONG_MODES)
def test_a_mode_of_another_device_is_refused_before_a_model_is_built(
    command: tuple[str, ...], mode: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "npu" and not emulator.is_active():
        pytest.skip("there are no emulated cards here")
    for target, name in ((ModelPair, "of_checkpoint"), (Qwen2ForCausalLM, "from_pretrained"), (Weights, "build")):
        monkeypatch.setattr(target, name, lambda *given, **named: pytest.fail("a model was built"))
    if command[0] != "generate":
        command += ("--json", str(tmp_path / "result.json"))
    steps = () if "--steps" in command or command[0] == "generate" else ("--steps", "swiglu")
    result = run(*command, *steps, "--mode", mode, "--device", kind)
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert re.search(rf"(whose modes are|or take one of) {', '.join(MODES_OF[kind])}", lines[0])


def test_generate_says_first_that_a_graph_needs_a_fixed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", lambda *given, **named: pytest.fail("a model was built"))
    result = run("generate", "--prompt", "x", "--device", "cpu", "--mode", "inductor", "--steps", "add_rms_norm")
    assert result.exit_code == 2
    assert "mode='inductor' needs the fixed_kv_cache step" in result.output


# ---- where the output goes -------------------------------------------------------------------------------------------
@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The end to write to; nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


PROGRESS = re.compile(r" \(\d+/\d+\): \d+\.\d s$")
"""A line that says that a part is done."""

SHORT = ("--model-path", str(tiny.path()), "--device", "cpu", "--input-len", "8", "--output-len", "4", "--batch", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        *((name, "--help") for name in COMMANDS),
        ("baselines",),
        ("baselines", "--check"),
        ("doctor",),
        ("report", "--results", "nothing"),
        ("bench", *SHORT, "--steps", "swiglu"),
        ("generate", "--device", "cpu", "--prompt", "x", "--max-new-tokens", "2"),
        ("generate", "--device", "cpu", "--prompt", "x", "--prompt", "y", "--max-new-tokens", "2"),
    ],
    ids=" ".join,
)
def test_a_reader_that_is_gone_ends_a_command_quietly(
    arguments: tuple[str, ...],
    closed_pipe: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with open(os.dup(closed_pipe), "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            main(arguments)
    assert end.value.code == CLOSED_PIPE
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if not PROGRESS.search(line)] == []


def test_what_verify_found_is_written_although_nobody_reads(
    closed_pipe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "verify.json"
    model = ("--model-path", str(small_folder(tmp_path / "model")), "--device", "cpu")
    with open(os.dup(closed_pipe), "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            main(["verify", *model, "--steps", "swiglu", "--json", str(path)])
    assert end.value.code == CLOSED_PIPE
    assert json.loads(path.read_text(encoding="utf-8"))["passed"]


@pytest.mark.parametrize("arguments", [("baselines",), ("--help",)], ids=" ".join)
def test_a_process_whose_reader_is_gone(arguments: tuple[str, ...], closed_pipe: int) -> None:
    """Python's own words at its end included."""
    command = [sys.executable, "-m", "qwen2_npu.cli", *arguments]
    done = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


def test_a_full_disk_is_said_once() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "qwen2_npu.cli", "baselines"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


def test_generate_continues_a_prompt() -> None:
    result = run("generate", "--prompt", "Let us count: two, three,", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    assert "Let us count: two, three, four" in result.output


def test_generate_batch_and_chat() -> None:
    result = run("generate", "--chat", "--prompt", "Who are you?", "--prompt", "你好！", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    assert result.output.count("→") == 2


def test_doctor_names_what_is_there_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", "/no/such/folder")
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__.split("+")[0] in result.output
    assert "torch_npu" in result.output
    assert "CANN" in result.output


def test_doctor_survives_a_broken_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2_npu.cli import doctor

    def broken() -> None:
        raise RuntimeError("libascend.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_cpu", broken)
    assert run("doctor").exit_code == 0
    assert any(finding.state.startswith("broken: libascend.so") for finding in doctor.findings())
