"""Peak memory of `qwen2-npu merge-qkv` and of loading one rank's part, on a random checkpoint of the 7B's layers.

python benchmarks/bench_merge_memory.py [--layers 4] [--tp-size 4] [--shard-size 500MB]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip

from qwen2_npu.checkpoint.weights import build
from qwen2_npu.conformance.machine.memory import Peak, peak_of
from qwen2_npu.conformance.perf.builds import RandomWeights
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM

MIB = 2**20

IMPORTS = "import qwen2_npu.checkpoint.merging, qwen2_npu.models.qwen2"

LOAD = """
import torch
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
model = Qwen2ForCausalLM.from_pretrained({folder!r}, tp_size={size}, tp_rank=0)
"""


def write_checkpoint(folder: Path, layers: int, shard_size: str) -> int:
    """Random weights of the 7B's shapes in bf16. Returns their bytes."""
    config = SIZES["7B"].config(layers=layers)
    source = RandomWeights(config, torch.bfloat16, torch.device("cpu"))
    model = build(lambda: Qwen2ForCausalLM(config), source, dtype=torch.bfloat16, device=torch.device("cpu"))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(*arguments: str) -> Peak:
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    peak = peak_of(process)
    if process.returncode:
        raise click.ClickException(f"{arguments} ended with status {process.returncode}")
    return peak


@click.command()
@click.option("--layers", default=4, show_default=True)
@click.option("--tp-size", default=4, show_default=True)
@click.option("--shard-size", default="500MB", show_default=True)
def main(layers: int, tp_size: int, shard_size: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, merged = Path(name, "ordinary"), Path(name, "merged")
        size = write_checkpoint(folder, layers, shard_size)
        command = ("-m", "qwen2_npu.cli", "merge-qkv")
        runs = {
            "imports alone": ("-c", IMPORTS),
            "merge-qkv": (
                *command,
                "--model-path",
                f"{folder}",
                "--tp-size",
                f"{tp_size}",
                "--output-path",
                f"{merged}",
            ),
            "merge-qkv --unmerge": (
                *command,
                "--unmerge",
                "--model-path",
                f"{merged}",
                "--output-path",
                f"{name}/back",
            ),
            "one rank, ordinary folder": ("-c", LOAD.format(folder=str(folder), size=tp_size)),
            "one rank, merged folder": ("-c", LOAD.format(folder=str(merged), size=tp_size)),
        }
        table = Table(
            title=f"{layers} layers of the 7B, bf16, {size / MIB:.0f} MiB in shards of {shard_size}, tp {tp_size}"
        )
        for header in ("", "own memory, MiB", "with pages of files, MiB"):
            table.add_column(header, justify="right")
        for form, arguments in runs.items():
            peak = measure(*arguments)
            table.add_row(form, f"{peak.own / MIB:.0f}", f"{peak.resident / MIB:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
