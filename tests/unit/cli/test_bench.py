"""``qwen2-npu bench``: what it measures and writes, and input it refuses before any work starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from qwen2_npu.checkpoint.quantizing import quantize
from qwen2_npu.cli import main
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import bench, breakdown, documented, protocol
from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.perf.measurement import Summary
from qwen2_npu.conformance.report.bench import tables
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.optimizations import LADDER, ORIGINAL, QUANTIZED

TINY = ["--model-path", str(tiny.path()), "--device", "cpu", "--input-len", "16", "--output-len", "5"]


CORES = len(os.sched_getaffinity(0))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def test_every_option_reaches_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Weights, "of", lambda *of: given.append(of) or Weights.of_checkpoint(of[1]))
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(bench, "check", lambda setup, todo: given.append((setup, todo)) or 1 / 0)
    options = "--assume-tp 2 --batch 3,5 --steps swiglu,original --mode inductor --dtype float16 --threads 1"
    run(*TINY, *options.split())
    weights = Weights.of_checkpoint(tiny.path())
    setup = bench.Setup(weights, "inductor", "cpu", torch.float16, 16, 5, 1)
    todo = [bench.BenchCase(step, batch) for step in ("swiglu", "original") for batch in (3, 5)]
    threads, asked, made = given
    assert (threads, asked[1:], made) == (1, (tiny.path(), 2), (setup, todo))


def test_measures_every_step_and_batch(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run(*TINY, "--batch", "1,2", "--steps", "original,swiglu", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "Measured on cpu" in result.output
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [(r["step"], r["batch"]) for r in content["results"]] == [
        (step, batch) for step in ("original", "swiglu") for batch in (1, 2)
    ]
    assert [len(table.rows) for table in tables(RunInputs.of(tmp_path))] == [4]  # as `report` reads it
    for r in content["results"]:
        assert r["decode_steps"] == 4
        assert r["faults"] == []
        assert r["prefill_ms"] > 0
        assert r["tokens_per_second"] == pytest.approx(r["batch"] / r["decode"]["mean"] * 1e3)
        assert r["decode_memory_share"] is None  # no roofline is known of a CPU
        assert r["documented_decode_ms"] is None  # no table has the tiny model


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint with 8-bit weights."""
    path = tmp_path_factory.mktemp("quantised")
    for scheme in QUANTIZED:
        quantize(tiny.path(), path / scheme, scheme=scheme)
    return {scheme: path / scheme for scheme in QUANTIZED}


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_8_bit_weights_are_measured_in_8_bits(scheme: str, in_8_bits: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    folder = ["--model-path", str(in_8_bits[scheme])]
    result = run(*TINY, *folder, "--batch", "1", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert [r["step"] for r in json.loads(path.read_text(encoding="utf-8"))["results"]] == [scheme]
    result = run(*TINY, *folder, "--batch", "1", "--steps", "original")
    assert result.exit_code == 2
    assert f"the weights of {scheme} are 8-bit integers; measure the checkpoint that they were made of" in words(result)


def test_which_steps_8_bit_weights_have(in_8_bits: dict[str, Path]) -> None:
    ladders = {name: Weights.of_checkpoint(path).ladder for name, path in in_8_bits.items()}
    assert ladders == {"w8a16": (*LADDER, "w8a16"), "w8a8": (*LADDER, "w8a16", "w8a8")}
    assert Weights.of_checkpoint(tiny.path()).ladder == (ORIGINAL, *LADDER)
    result = run(*TINY, "--steps", "w8a8")
    assert result.exit_code == 2
    assert "the weights of tiny are not made for that; write some with qwen2-npu quantize --scheme w8a8" in words(
        result
    )


def test_8_bit_weights_take_less_memory(in_8_bits: dict[str, Path]) -> None:
    setup = bench.Setup(Weights.of_checkpoint(in_8_bits["w8a8"]), "eager", "cpu", torch.bfloat16, 16, 5, 1)
    needed = [bench.least_bytes(setup, bench.BenchCase(step, 1)) for step in ("swiglu", "w8a8")]
    size = setup.weights.size
    assert needed[0] - needed[1] == size.quantised - 2 * size.channels  # a byte of two each, less the scales


SMALL = Size("0.5B", 128, 192, 2, 4, 2, 32, 199, tied=True)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("w8a16", "0.5B, random weights in w8a16 · bfloat16 · eager"),
        ("swiglu,w8a16,w8a8", "0.5B, random weights in bfloat16, w8a16, w8a8 · bfloat16 · eager"),
        ("original,swiglu", "0.5B, random weights · bfloat16 · eager"),
    ],
)
def test_random_weights_are_measured_in_8_bits(
    steps: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "0.5B", SMALL)
    path = tmp_path / "bench.json"
    arguments = ["--random-weights", "0.5B", "--device", "cpu", "--input-len", "16", "--output-len", "5"]
    result = run(*arguments, "--batch", "1", "--steps", steps, "--json", str(path))
    assert result.exit_code == 0, result.output
    assert said in words(result)
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert [(r["step"], r["weights"], r["faults"]) for r in results] == [(s, "random", []) for s in steps.split(",")]
    (table,) = tables(RunInputs.of(tmp_path))
    assert said.split(" · ")[0].removeprefix("0.5B, ") in table.title


def words(result: Result) -> str:
    """The output without line breaks and frames."""
    return " ".join(result.output.replace("│", " ").split())


def test_the_breakdown_shows_the_profile_and_whose_time_it_is() -> None:
    result = run(*TINY, "--batch", "1", "--steps", "swiglu", "--breakdown")
    assert result.exit_code == 0, result.output
    assert "Measured on cpu, host time: a decode step of swiglu, batch 1, after 18 tokens" in words(result)
    assert "aten::" in result.output
    assert "no prediction" in result.output


def _of_7b(right: Callable[..., Any], *_: Any) -> Any:
    return right(SIZES["7B"], "fused_qkv", 4)


def test_a_prediction_says_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has none; it borrows the 7B's."""
    monkeypatch.setattr(breakdown, "predicted", partial(_of_7b, breakdown.predicted))
    result = run(*TINY, "--batch", "1", "--steps", "fused_qkv", "--breakdown")
    said = "not measured: a decode step in graph mode of fused_qkv, batch 1, after 1535 tokens"
    assert said in words(result)
    assert re.search(r"IncreFlashAttention 28 0\.\d\d to 0\.\d\d memory", words(result)), words(result)


WARNED, ALL = "the fastest core runs at 60%", "the process may run on 2 NUMA nodes"


def test_a_warning_says_which_cases_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    right = protocol.measure

    def measure(model: Any, *, batch: int, **named: Any) -> Any:
        fewer = {"decode_ms": (1.0,) * 2} if batch == 2 else {}
        return replace(right(model, batch=batch, **named), warnings=(ALL, *((WARNED,) if batch == 4 else ())), **fewer)

    monkeypatch.setattr(protocol, "measure", measure)
    result = run(*TINY, "--batch", "1,2,4", "--steps", "original,swiglu")
    assert result.exit_code == 0, result.output
    assert f"! original, batch 1, 2, 4; swiglu, batch 1, 2, 4: {ALL}" in words(result)
    assert f"! original, batch 4; swiglu, batch 4: {WARNED}" in words(result)
    assert "! original, batch 2; swiglu, batch 2: 2 decode steps of 4 asked for" in words(result)


def test_why_there_is_no_documented_number_is_said_of_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from qwen2_npu.cli.bench import show

    numbers = {field.name: 1 for field in fields(bench.BenchResult)}
    of = {"step": "original", "device": "cpu", "decode": Summary(1, 1, 1), "warnings": (), "faults": ()}
    measured = [
        bench.BenchResult(**(numbers | of | {"batch": batch, "not_documented": (f"reason {batch // 4}",)}))
        for batch in (1, 2, 4)
    ]
    show(measured, Console(width=200), "cpu")
    said = capsys.readouterr().out
    assert "original, batch 1, 2: beside no documented number: reason 0." in said
    assert "original, batch 4: beside no documented number: reason 1." in said


# ---- what was measured stays ----------------------------------------------------------------------------------------
def failing_at_batch_2(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    right = protocol.measure

    def measure(model: Any, *, batch: int, **named: Any) -> Any:
        if batch == 2:
            raise error
        return right(model, batch=batch, **named)

    monkeypatch.setattr(protocol, "measure", measure)


OUT_OF_MEMORY = (
    "NPU out of memory. Tried to allocate 64.00 GiB (NPU 0; 32.00 GiB total capacity; 0 bytes already allocated).\n"
    "If reserved memory is >> allocated memory try setting max_split_size_mb"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            "error: out of memory: 64.00 GiB more could not be had; take a smaller",
        ),
        (torch.OutOfMemoryError("no numbers"), "error: out of memory: no numbers; take a smaller batch, fewer tokens"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
            "error: out of memory: 99 bytes more could not be had",
        ),
    ],
)
def test_out_of_memory_is_one_line_after_what_was_measured(
    error: RuntimeError, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at_batch_2(monkeypatch, error)
    path = tmp_path / "bench.json"
    result = run(*TINY, "--batch", "1,2,4", "--steps", "swiglu", "--json", str(path))
    assert result.exit_code == 2
    assert "Measured on cpu" in result.output
    assert "Stopped at swiglu, batch 2: 1 of 3 cases were measured." in words(result)
    assert message in result.output
    assert "Traceback" not in result.output
    assert [r["batch"] for r in json.loads(path.read_text(encoding="utf-8"))["results"]] == [1]


def test_any_other_failure_shows_what_was_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at_batch_2(monkeypatch, RuntimeError("a bug"))
    result = run(*TINY, "--batch", "1,2", "--steps", "swiglu")
    assert isinstance(result.exception, RuntimeError)  # with its traceback
    assert "Measured on cpu" in result.output


def test_with_traceback_out_of_memory_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at_batch_2(monkeypatch, torch.OutOfMemoryError(OUT_OF_MEMORY))
    result = CliRunner().invoke(main, ["--traceback", "bench", *TINY, "--batch", "2", "--steps", "swiglu"])
    assert isinstance(result.exception, torch.OutOfMemoryError)
    assert "Stopped at swiglu, batch 2: 0 of 1 cases" in words(result)


# ---- what is refused before any work --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "torchair"], "error: mode='torchair' "),
        (["--mode", "npugraph_ex", "--steps", "original"], "error: mode='npugraph_ex' captures a graph per shape"),
        (["--input-len", "3000"], "3000 tokens and 5 new ones need 3004 positions, the model has max_position"),
        (["--input-len", "100000", "--batch", "48"], "100000 tokens and 5 new ones need"),
        (["--breakdown", "--input-len", "2047", "--output-len", "2"], "need 2050 positions"),
        (["--json", "/"], "error: / is a folder: name a file in it"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_built(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "build", lambda *rest: pytest.fail("a model was built"))
    result = run(*TINY, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_json_file_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "build", lambda *rest: pytest.fail("a model was built"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = run(*TINY, "--json", str(tmp_path / "file" / "bench.json"))
    assert result.exit_code == 2
    assert "bench.json cannot be written" in result.output


def test_too_little_memory_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(Weights, "build", lambda *rest: pytest.fail("a model was built"))
    result = run(*TINY, "--steps", "swiglu")
    assert result.exit_code == 2
    assert "error: swiglu, batch 1, needs" in result.output


def test_an_installed_wheel_measures_without_the_documented_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documented, "BASELINES", tmp_path)
    result = run(*TINY, "--batch", "1", "--steps", "swiglu")
    assert result.exit_code == 0, result.output
    assert "Documented numbers are in a checkout alone, not in an installed wheel." in words(result)


def test_damaged_documented_numbers_are_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / documented.SOURCE).write_text("numbers = ", encoding="utf-8")
    monkeypatch.setattr(documented, "BASELINES", tmp_path)
    monkeypatch.setattr(Weights, "build", lambda *rest: pytest.fail("a model was built"))
    result = run(*TINY)
    assert result.exit_code == 2
    assert "documented.toml is not valid TOML" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --model-path DIR and --random-weights SIZE"),
        (["--random-weights", "7B", "--model-path", "x"], "give one of"),
        (["--random-weights", "8B"], "there are 0.5B, 1.5B, 7B, 72B and 57B-A14B"),
        (["--random-weights", "7B", "--batch", "1,x"], "not a list of numbers"),
        (["--random-weights", "7B", "--batch", "0"], "at least 1"),
        (["--random-weights", "7B", "--steps", "faster"], "no step faster"),
        (["--random-weights", "7B", "--steps", "swiglu,fused_moe"], "--steps fused_moe: 7B is no mixture of experts"),
        *(
            (
                ["--random-weights", "57B-A14B", "--steps", scheme],
                f"--steps {scheme}: 57B-A14B is a mixture of experts, which is not computed in 8 bits; use fused_moe",
            )
            for scheme in QUANTIZED
        ),
        (["--random-weights", "7B", "--steps", "mm_all_reduce,w8a16"], "no step mm_all_reduce"),
        (["--random-weights", "7B", "--output-len", "1"], "output-len"),
        (["--random-weights", "7B", "--threads", "0"], "'--threads': 0 is not in the range"),
        *(
            (["--threads", str(n)], f"{n} threads: this process may use {CORES} cores; give 1 to {CORES}")
            for n in (CORES + 1, 100000)
        ),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
