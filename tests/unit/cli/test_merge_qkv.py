"""``qwen2-npu merge-qkv``, and the commands that read what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint.merging import merge_qkv
from qwen2_npu.cli import main
from qwen2_npu.conformance import tiny
from tests.unit.checkpoint.merges import config_of, digest, guide_merged, weights_of, write_folder

CONFIG = config_of(4, 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def merge(*arguments: object) -> Result:
    return run("merge-qkv", *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "ordinary", CONFIG, weights_of(CONFIG), shards=2)


@pytest.fixture
def by_guide(tmp_path: Path) -> Path:
    """The tiny checkpoint, as the guide's script leaves it."""
    model = Qwen2ForCausalLM.from_pretrained(tiny.path())
    weights = guide_merged(model.config, model.stock_state_dict(), 2)
    path = write_folder(tmp_path / "guide", model.config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny.path() / name).read_bytes())
    return path


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    (folder / "model.gguf").touch()
    result = merge("--model-path", folder, "--tp-size", 2, "--output-path", merged)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-2] == "Not copied: model.gguf"
    assert f"Written and compared with {folder}: {merged}, " in result.output
    assert json.loads((merged / "config.json").read_text())["qwen2_npu"]["tp_size"] == 2
    result = merge("--model-path", merged, "--output-path", tmp_path / "back", "--unmerge")
    assert result.exit_code == 0, result.output
    (folder / "model.gguf").unlink()
    assert digest(tmp_path / "back") == digest(folder)


def test_one_rank_by_default(folder: Path, tmp_path: Path) -> None:
    assert merge("--model-path", folder, "--output-path", tmp_path / "merged").exit_code == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["qwen2_npu"]["tp_size"] == 1


def test_dry_run(folder: Path, tmp_path: Path) -> None:
    result = merge("--model-path", folder, "--tp-size", 4, "--output-path", tmp_path / "merged", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "model-00001-of-00002.safetensors  " in result.output
    assert f"To be written to {tmp_path / 'merged'}: 6 files, " in result.output
    assert "Each of 4 ranks reads " in result.output
    assert "Free on that disk: " in result.output
    assert "Nothing was written." in result.output
    assert not (tmp_path / "merged").exists()


def test_help_says_whom_they_are_for() -> None:
    text = " ".join(merge("--help").output.split())
    assert "Merged folders are for this project: transformers and other programs do not read them." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--assume-tp", "2"], "--assume-tp needs --unmerge"),
        (["--tp-size", "3"], "error: tp_size=3: 4 query heads and 2 kv heads: 3 ranks do not divide 4"),
        (["--tp-size", "0"], "0 is not in the range x>=1"),
        (["--unmerge"], "has no merged q, k and v: it is an ordinary checkpoint"),
        (["--unmerge", "--assume-tp", "2"], "assume_tp=2: "),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    result = merge("--model-path", folder, "--output-path", tmp_path / "merged", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "merged").exists()


IN_CI = (pytest.mark.slow, pytest.mark.slow_in_ci)


@pytest.mark.parametrize(
    "command", ["generate", pytest.param("verify", marks=IN_CI), pytest.param("bench", marks=IN_CI)]
)
def test_the_guide_s_folder_needs_its_tp_size(command: str, by_guide: Path, tmp_path: Path) -> None:
    options = {
        "generate": ["--prompt", "Once upon", "--max-new-tokens", 2],
        "verify": ["--json", tmp_path / "verify.json", "--steps", "fused_qkv"],
        "bench": ["--input-len", 4, "--output-len", 2, "--batch", 1, "--device", "cpu"],
    }[command]
    result = run(command, "--model-path", by_guide, *options)
    assert result.exit_code == 2
    assert result.output.strip().startswith(f"error: {by_guide} has 8 merged tensors (model.layers.0.self_attn.qkv.")
    assert "--assume-tp N" in result.output
    result = run(command, "--model-path", by_guide, "--assume-tp", 2, *options)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.slow_in_ci
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_folder_merged_for_several_ranks_is_compared(command: str, tmp_path: Path) -> None:
    merge_qkv(tiny.path(), tmp_path / "merged", tp_size=2)
    options = {
        "verify": ["--json", tmp_path / "verify.json", "--steps", "fixed_kv_cache"],
        "bench": ["--input-len", 4, "--output-len", 2, "--batch", 1, "--device", "cpu"],
    }[command]
    result = run(command, "--model-path", tmp_path / "merged", *options)
    assert result.exit_code == 0, result.output
    if command == "verify":
        report = json.loads((tmp_path / "verify.json").read_text())
        assert report["perplexity"]["baseline"] < 20, "the stock model has the weights of the folder"


def test_bench_of_random_weights_assumes_nothing() -> None:
    result = run("bench", "--random-weights", "0.5B", "--assume-tp", 2)
    assert result.exit_code == 2
    assert "--assume-tp needs --model-path" in result.output
