"""``qwen2-npu quantize``, and the commands that read what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen2_npu.checkpoint.quantizing import SCHEMES
from qwen2_npu.cli import main, quantize
from qwen2_npu.cli.merge_qkv import size
from qwen2_npu.conformance import tiny
from tests.unit.checkpoint.merges import config_of, digest, tensors_of, weights_of, write_folder

CONFIG = config_of(4, 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def words(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "ordinary", CONFIG, weights_of(CONFIG), shards=2)


def test_schemes_are_those_that_there_are() -> None:
    assert tuple(quantize.SCHEMES) == SCHEMES


def test_what_it_says(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "written"
    (folder / "model.gguf").touch()
    arguments = (
        "quantize",
        "--model-path",
        folder,
        "--scheme",
        "w8a8",
        "--ignore",
        "down_proj",
        "--ignore",
        "layers.1",
    )
    result = run(*arguments, "--output-path", output)
    assert result.exit_code == 0, result.output
    kept = "down_proj (2), q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, lm_head"
    before, after = (sum(tensor.nbytes for tensor in tensors_of(each).values()) for each in (folder, output))
    lines = result.output.splitlines()
    assert "Not copied: model.gguf" in lines
    assert f"w8a8: 6 linear layers in 8 bits; kept as they are: {kept}" in lines
    assert f"Weights: {size(before)} before, {size(after)} after ({after / before:.0%})" in lines
    assert lines[-1].startswith(f"Written and compared with {folder}: {output}, 6 files, ")
    said = json.loads((output / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    assert len(said["ignore"]) == 9


def test_dry_run(folder: Path, tmp_path: Path) -> None:
    before = digest(tmp_path)
    result = run(
        "quantize", "--model-path", folder, "--scheme", "w8a16", "--output-path", tmp_path / "new", "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert "model-00001-of-00002.safetensors  " in result.output
    assert f"To be written to {tmp_path / 'new'}: 6 files, " in result.output
    assert "w8a16: 14 linear layers in 8 bits; kept as they are: lm_head" in result.output
    assert "Nothing was written." in result.output
    assert digest(tmp_path) == before


def test_help_says_what_comes_out() -> None:
    text = words(run("quantize", "--help"))
    assert "The folder is in the format of compressed-tensors, which vLLM and transformers read, too." in text
    assert "w8a16: 8-bit weights; activations stay as they are; w8a8: 8-bit weights and, while the model runs" in text
    assert "pattern ('re:.*o_proj')" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--scheme'"),
        (["--scheme", "w4a16"], "'w4a16' is not one of 'w8a16', 'w8a8'"),
        (
            ["--scheme", "w8a8", "--ignore", "x_proj"],
            "error: --ignore x_proj: no linear layer of this model has that name",
        ),
        (["--scheme", "w8a8", "--ignore", "k_proj"], "error: --ignore k_proj: quantization_config: "),
        (["--scheme", "w8a8", "--model-path", "nowhere"], "error: model path 'nowhere' is not a folder"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    result = run("quantize", "--model-path", folder, "--output-path", tmp_path / "written", *arguments)
    assert result.exit_code == 2
    assert message in words(result)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generating_with_what_it_wrote(scheme: str, tmp_path: Path) -> None:
    output = tmp_path / "written"
    assert run("quantize", "--model-path", tiny.path(), "--scheme", scheme, "--output-path", output).exit_code == 0
    result = run("generate", "--model-path", output, "--prompt", "The cat", "--max-new-tokens", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert len(result.output.split()) > 2
    result = run("quantize", "--model-path", output, "--scheme", scheme, "--output-path", tmp_path / "again")
    assert result.exit_code == 2
    assert f"is quantised already ({scheme})" in words(result)
