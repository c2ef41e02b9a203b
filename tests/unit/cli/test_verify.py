"""``qwen2-npu verify`` on a checkpoint that cannot be compared; what it does with others is in test_cli.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwen2_npu.cli import main, ranks
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import verify as engine
from qwen2_npu.conformance.accuracy.layer_by_layer import LayerByLayer
from tests.accuracy import quantised
from tests.accuracy.faults import FAULTS
from tests.unit.cli.test_cli import small_folder


def test_one_line_and_no_report(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.path(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 1}))
    report = tmp_path / "verify.json"
    result = CliRunner().invoke(main, ["verify", "--model-path", str(folder), "--json", str(report)])
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {folder} does not fit its configuration: ")
    assert "mlp.down_proj.weight has shape" in lines[0] or "mlp.gate_proj.weight has shape" in lines[0]
    assert not report.exists()


def test_a_step_of_several_ranks_on_one(tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    result = CliRunner().invoke(main, ["verify", "--device", "cpu", "--steps", "mm_all_reduce", "--json", str(report)])
    assert result.exit_code == 2
    (line,) = filter(None, result.output.splitlines())
    assert line.startswith("error: --steps mm_all_reduce: mm_all_reduce takes 2, 4, 8 ranks, and there is 1; leave it")
    assert not report.exists()


def test_every_option_reaches_the_comparison_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the report can be written: a comparison may take hours."""
    given: list[Any] = []

    def verify(*of: Any, progress: Any, **how: Any) -> Any:
        given.append((of, how))
        raise ValueError("enough")

    monkeypatch.setattr(engine, "verify", verify)
    monkeypatch.setattr(engine, "take_part", lambda *of, **how: given.append((of, how)))
    options = [
        "--model-path",
        str(tmp_path),
        "--assume-tp",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float16",
        "--no-stream",
    ]
    options += ["--steps", "swiglu", "--mode", "inductor", "--against", str(tmp_path), "--json"]
    refused = CliRunner().invoke(main, ["verify", *options, str(tmp_path)])
    assert (refused.exit_code, given) == (2, [])
    assert CliRunner().invoke(main, ["verify", *options, str(tmp_path / "a.json")]).exit_code == 2
    common = {"device": "cpu", "dtype": "float16", "assume_tp": 2}
    first = common | {"steps": ("swiglu",), "mode": "inductor", "stream": False, "against": tmp_path}
    monkeypatch.setattr(ranks, "first", lambda: False)
    assert CliRunner().invoke(main, ["verify", *options, str(tmp_path / "a.json")]).exit_code == 1
    assert given == [((tmp_path,), first), ((tmp_path,), common)]


def test_layer_by_layer_with_every_other_option(tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    options = ["--model-path", str(small_folder(tmp_path / "model")), "--device", "cpu", "--dtype", "bfloat16"]
    options += ["--steps", "fixed_kv_cache,swiglu", "--mode", "eager", "--json", str(report)]
    result = CliRunner().invoke(main, ["verify", "--stream", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert (found["streamed"], found["dtype"], found["mode"]) == ("asked for", "bfloat16", "eager")
    assert [row["step"] for row in found["rows"]] == ["fixed_kv_cache", "swiglu"]
    assert "went layer by layer (asked for)" in " ".join(result.output.split())


@pytest.mark.slow
def test_a_fault_is_named_layer_by_layer(tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "rope_halves_swapped")
    report = tmp_path / "verify.json"
    folder = small_folder(tmp_path / "model")
    options = ["--model-path", str(folder), "--device", "cpu", "--steps", "flash_attention", "--json", str(report)]
    with fault.active():
        result = CliRunner().invoke(main, ["verify", "--stream", *options])
    assert result.exit_code == 1, result.output
    assert "step flash_attention, layer 0, query" in json.loads(report.read_text())["rows"][0]["explanation"]


def test_weights_that_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one checkpoint and half of another is none: one line, and no report."""
    folder, report = small_folder(tmp_path / "model"), tmp_path / "verify.json"
    right = LayerByLayer._parts

    def rewritten(self: LayerByLayer, prefix: str, *layers: int) -> list[Any]:
        if layers == (1,):
            small_folder(folder)
        return right(self, prefix, *layers)

    monkeypatch.setattr(LayerByLayer, "_parts", rewritten)
    options = ["--model-path", str(folder), "--device", "cpu", "--json", str(report)]
    result = CliRunner().invoke(main, ["verify", "--stream", *options])
    assert result.exit_code == 2
    (line,) = filter(None, result.output.splitlines())
    assert line.startswith(f"error: {folder}/model.safetensors was changed or replaced while")
    assert not report.exists()


def test_a_line_for_each_step_without_a_terminal(tmp_path: Path) -> None:
    options = ["--model-path", str(small_folder(tmp_path / "model")), "--device", "cpu", "--json", str(tmp_path / "r")]
    result = CliRunner().invoke(main, ["verify", "--steps", "fixed_kv_cache,swiglu", *options])
    assert result.exit_code == 0, result.output
    lines = [line.rpartition(":")[0] for line in result.stderr.splitlines() if line.endswith(" s")]
    parts = ("stock model and float64 reference", "fixed_kv_cache", "swiglu", "perplexity and greedy text")
    assert lines == [f"{part} ({done}/4)" for done, part in enumerate(parts, start=1)]


# ---- 8-bit weights ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_what_8_bits_cost_is_shown_and_written(tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    options = ["--model-path", str(quantised.folder("w8a8")), "--device", "cpu", "--steps", "w8a8"]
    options += ["--against", str(tiny.path()), "--json", str(report)]
    result = CliRunner().invoke(main, ["verify", *options])
    assert result.exit_code == 0, result.output
    shown, cost = " ".join(result.output.split()), json.loads(report.read_text())["cost"]
    whole = cost["whole"]
    assert f"w8a8 against {tiny.path()}, both in float32, 508 held-out tokens" in shown
    assert f"perplexity {cost['perplexity']:.4f} → {whole['perplexity']:.4f}, KL {whole['kl']:.2e}" in shown
    costliest = max(cost["modules"], key=lambda name: cost["modules"][name]["kl"])
    assert shown.index("The 8 costliest modules, each alone in 8 bits") < shown.index(
        costliest.removeprefix("model.layers.")
    )
    assert "KL alone, summed over the layers: " in shown


@pytest.mark.slow
def test_a_step_that_is_left_out_is_said(tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    options = ["--model-path", str(quantised.folder("w8a8")), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(main, ["verify", *options, "--json", str(report)])
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["rows"][-1]["step"] == "w8a16"
    assert found["left_out"].startswith("w8a8 is not compared in float32, ")
    assert "Left out: w8a8 is not compared in float32" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("model", "against", "message"),
    [
        ("", "tiny", "the tiny checkpoint is not quantised, so there is nothing that 8 bits cost; give the quantised"),
        ("w8a16", "w8a8", "its weights are quantised, too; give the folder in floating point that "),
        ("w8a16", "other", r"was not made of it: model.embed_tokens.weight has shape \(2048, 256\) there, and \(199, "),
        ("w8a16", "nothing", "does not exist"),
    ],
)
def test_another_folder_than_the_one_it_was_made_of(model: str, against: str, message: str, tmp_path: Path) -> None:
    """One line, before any work."""
    report = tmp_path / "verify.json"
    folders = {"tiny": tiny.path(), "other": tmp_path / "model", "nothing": tmp_path / "nothing"}
    if against == "other":
        small_folder(folders["other"])
    folder = folders.get(against) or quantised.folder(against)
    options = ["--model-path", str(quantised.folder(model))] if model else []
    result = CliRunner().invoke(
        main, ["verify", "--device", "cpu", *options, "--against", str(folder), "--json", str(report)]
    )
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not report.exists()
    if against != "nothing":
        (line,) = filter(None, result.output.splitlines())
        assert line.startswith(f"error: --against {folder}: ")


def test_no_tokenizer_and_no_text(tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(of, tmp_path / of.name)) for of in (quantised.folder("w8a16"), tiny.path())]
    for folder in folders:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    options = ["--model-path", str(folders[0]), "--against", str(folders[1]), "--json", str(tmp_path / "verify.json")]
    result = CliRunner().invoke(main, ["verify", "--device", "cpu", *options])
    assert result.exit_code == 2
    assert "neither folder has a tokenizer, and the cost is measured on text" in " ".join(result.output.split())
