"""``qwen2-npu bench``: what it measures and writes, and input it refuses before any work starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwen2_npu.cli import main
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.report.bench import tables
from qwen2_npu.conformance.report.inputs import Inputs

TINY = ["--model-path", str(tiny.path()), "--device", "cpu", "--input-len", "16", "--output-len", "5"]


def run(*arguments: str):
    return CliRunner().invoke(main, ["bench", *arguments])


def test_measures_every_step_and_batch(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run(*TINY, "--batch", "1,2", "--steps", "original,swiglu", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "Measured on cpu" in result.output
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [(r["step"], r["batch"]) for r in content["results"]] == [
        (step, batch) for step in ("original", "swiglu") for batch in (1, 2)
    ]
    assert [len(table.rows) for table in tables(Inputs.of(tmp_path))] == [4]  # as `report` reads it
    for r in content["results"]:
        assert r["decode_steps"] == 4
        assert r["faults"] == []
        assert r["prefill_ms"] > 0
        assert r["tokens_per_second"] == pytest.approx(r["batch"] / r["decode"]["mean"] * 1e3)
        assert r["decode_memory_share"] is None  # no roofline is known of a CPU
        assert r["documented_decode_ms"] is None  # no table has the tiny model


def test_the_breakdown_shows_the_profile(tmp_path: Path) -> None:
    result = run(*TINY, "--batch", "1", "--steps", "swiglu", "--breakdown")
    assert result.exit_code == 0, result.output
    assert "a decode step of swiglu" in result.output
    assert "npu" in result.output or "aten::" in result.output
    assert "no prediction" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --model-path DIR and --random-weights SIZE"),
        (["--random-weights", "7B", "--model-path", "x"], "give one of"),
        (["--random-weights", "8B"], "there are 0.5B, 1.5B, 7B and 72B"),
        (["--random-weights", "7B", "--batch", "1,x"], "no list of numbers"),
        (["--random-weights", "7B", "--batch", "0"], "at least 1"),
        (["--random-weights", "7B", "--steps", "faster"], "no step faster"),
        (["--random-weights", "7B", "--output-len", "1"], "output-len"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
