"""Decode on a CPU with 8-bit weights against bf16 ones: one process, in turns; and the memory of each.

python benchmarks/bench_quantized.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from timing import CLOCKS, medians  # isort: skip

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import QUANTIZED

BF16 = "bf16"
KINDS = (BF16, *QUANTIZED)

SHAPES = ("0.5B", "1.5B")


def build(kind: str, shape: str, mode: str, layers: int | None) -> Any:
    """A model with random weights, in bf16 but for those that are integers."""
    scheme = None if kind == BF16 else kind
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizations = Optimizations.all() if scheme is None else Optimizations.up_to(scheme)
        config = SIZES[shape].config(layers=layers, scheme=scheme)
        model = Qwen2ForCausalLM(config, optimizations).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return compile_model(model, mode)


class Decoding:
    """One token after another for the same rows."""

    def __init__(self, model: Any, batch: int, prompt: int, steps: int) -> None:
        self.model = model
        self.cache = model.allocate_cache(batch, prompt + steps)
        model(torch.ones(batch, prompt, dtype=torch.int64), past_key_values=self.cache, logits_to_keep=1)
        self.token = torch.ones(batch, 1, dtype=torch.int64)

    def step(self) -> None:
        self.model(self.token, past_key_values=self.cache)


def resident(key: str) -> int:
    """Bytes that this process has in memory, or has had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def run_for_memory(kind: str, shape: str, mode: str, layers: int | None) -> None:
    before = resident("VmRSS")
    decoding = Decoding(build(kind, shape, mode, layers), 1, 32, 8)
    for _ in range(4):
        decoding.step()
    print(resident("VmRSS") - before)


def memory(kind: str, shape: str, mode: str, layers: int | None) -> float:
    """Gigabytes of a fresh process while it decodes, less those of one that only imports."""
    command = [sys.executable, __file__, "--memory-of", kind, "--shape", shape, "--mode", mode]
    command += [] if layers is None else ["--layers", str(layers)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1e9


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, type=click.Choice(SHAPES))
@click.option("--mode", "modes", multiple=True, default=["eager", "inductor"])
@click.option("--batch", "batches", multiple=True, default=[1, 4], type=int)
@click.option("--prompt", default=128)
@click.option("--rounds", default=15, help="Decode steps of every model, in turns; medians are shown.")
@click.option("--threads", default=1)
@click.option("--clock", default="cpu", type=click.Choice(list(CLOCKS)), help="cpu: of one thread on a busy machine.")
@click.option("--layers", type=int, help="Fewer than the model has.")
@click.option("--memory-of", hidden=True)
@torch.no_grad()
def main(
    shapes: tuple[str, ...],
    modes: tuple[str, ...],
    batches: tuple[int, ...],
    prompt: int,
    rounds: int,
    threads: int,
    clock: str,
    layers: int | None,
    memory_of: str | None,
) -> None:
    """Measure decode steps side by side."""
    torch.set_num_threads(threads)
    if memory_of:
        run_for_memory(memory_of, shapes[0], modes[0], layers)
        return
    table = Table(title=f"decode after {prompt} tokens, {threads} threads, {clock} clock, medians of {rounds}")
    for heading in ("shape", "mode", "batch", *(f"{kind} ms" for kind in KINDS), "w8a16 ×", "w8a8 ×"):
        table.add_column(heading, justify="right")
    sizes = Table(title="GB resident while decoding at batch 1")
    for heading in ("shape", "mode", *KINDS):
        sizes.add_column(heading, justify="right")
    for shape in shapes:
        for mode in modes:
            torch._dynamo.reset()
            models = {kind: build(kind, shape, mode, layers) for kind in KINDS}
            for batch in batches:
                running = {kind: Decoding(model, batch, prompt, rounds + 4) for kind, model in models.items()}
                steps = {kind: decoding.step for kind, decoding in running.items()}
                found = {kind: 1e3 * taken for kind, taken in medians(steps, rounds, clock=CLOCKS[clock]).items()}
                ratios = [found[BF16] / found[kind] for kind in QUANTIZED]
                row = (shape, mode, str(batch), *(f"{found[kind]:.1f}" for kind in KINDS))
                table.add_row(*row, *(f"{ratio:.2f}" for ratio in ratios))
            del models
            sizes.add_row(shape, mode, *(f"{memory(kind, shape, mode, layers):.2f}" for kind in KINDS))
    Console().print(table)
    Console().print(sizes)


if __name__ == "__main__":
    main()
