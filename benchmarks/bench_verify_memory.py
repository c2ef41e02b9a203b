"""Peak memory of `qwen2-npu verify` with the stock model whole and layer by layer, on a random checkpoint.

python benchmarks/bench_verify_memory.py [--layers 24] [--dtype bfloat16]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.configs import random_state_dict, small_config
from qwen2_npu.conformance.machine.memory import Peak, peak_of

MIB = 2**20
FORMS = {"imports alone": None, "whole": "--no-stream", "layer by layer": "--stream"}


def write_checkpoint(folder: Path, layers: int, dtype: torch.dtype, vocab_size: int) -> int:
    """A checkpoint of the 0.5B's head layout with the tiny one's tokenizer. Returns its parameters."""
    config = small_config("qwen2-0.5b", layers=layers, vocab_size=vocab_size)
    config.hidden_size, config.intermediate_size = 896, 2432
    config.max_position_embeddings = 2048
    state = random_state_dict(config, dtype=dtype)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny.path() / name).read_bytes())
    return sum(tensor.numel() for tensor in state.values())


def measure(folder: Path, option: str | None) -> tuple[Peak, dict[str, object]]:
    """A child process that verifies the checkpoint, or only imports what it needs for that."""
    report = folder / "verify.json"
    arguments = ["verify", "--model-path", folder, "--device", "cpu", "--steps", "swiglu", "--json", report, option]
    code = "import qwen2_npu.conformance.accuracy.verify"
    command = ["-c", code] if option is None else ["-m", "qwen2_npu.cli", *map(str, arguments)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    peak = peak_of(process)
    if process.returncode:
        raise click.ClickException(f"{command} ended with status {process.returncode}")
    return peak, {} if option is None else json.loads(report.read_text(encoding="utf-8"))


@click.command()
@click.option("--layers", default=24, show_default=True)
@click.option("--vocab-size", default=2048, show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), default="bfloat16", show_default=True)
def main(layers: int, vocab_size: int, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_checkpoint(folder, layers, getattr(torch, dtype), vocab_size)
        size = parameters * getattr(torch, dtype).itemsize
        table = Table(
            title=f"{parameters / 1e6:.0f} million parameters, {layers} layers, {dtype}: {size / MIB:.0f} MiB stored, "
            f"{parameters * 8 / MIB:.0f} MiB in float64"
        )
        for header in ("", "own memory, MiB", "with pages of files, MiB", "verdict"):
            table.add_column(header, justify="right")
        for form, option in FORMS.items():
            peak, report = measure(folder, option)
            verdict = {True: "passed", False: "FAILED"}.get(report.get("passed"), "–")  # type: ignore[arg-type]
            table.add_row(form, f"{peak.own / MIB:.0f}", f"{peak.resident / MIB:.0f}", verdict)
    Console().print(table)


if __name__ == "__main__":
    main()
