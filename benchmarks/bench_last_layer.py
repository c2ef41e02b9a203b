"""Prefill on a CPU with and without the step last_layer: one model's two forms, in turns.

python benchmarks/bench_last_layer.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from timing import medians  # isort: skip

from qwen2_npu.conformance.perf.builds import Weights
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES

SIZE = "0.5B"
BEFORE, AFTER = "swiglu", "last_layer"


def prefill(model: Any, tokens: torch.Tensor) -> None:
    """One prompt, of which the last logits are kept."""
    model(tokens, past_key_values=model.allocate_cache(*tokens.shape), logits_to_keep=1)


@click.command()
@click.option("--rounds", default=5, help="Rounds of both, interleaved; medians are shown.")
@click.option("--threads", default=2)
@click.option("--layers", default=SIZES[SIZE].layers, help="Fewer than the model has.")
@click.option("--tokens", default="128,1024", help="Of the prompts.")
@click.option("--batch", default="1,4")
@torch.no_grad()
def main(rounds: int, threads: int, layers: int, tokens: str, batch: str) -> None:
    """Measure prefill of a Qwen2-0.5B-shaped model, side by side."""
    torch.set_num_threads(threads)
    weights = Weights(replace(SIZES[SIZE], layers=layers))
    table = Table(title=f"prefill, {layers} layers: {AFTER} against {BEFORE}")
    for heading in ("dtype", "prompt", "batch", f"ms {BEFORE}", f"ms {AFTER}", "ratio"):
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        models = {
            step: weights.build(Configuration(SIZE, 1, 1, "eager", step), "cpu", dtype) for step in (BEFORE, AFTER)
        }
        for length in map(int, tokens.split(",")):
            for rows in map(int, batch.split(",")):
                given = torch.ones(rows, length, dtype=torch.int64)
                found = medians({step: partial(prefill, model, given) for step, model in models.items()}, rounds)
                before, after = (found[step] * 1e3 for step in (BEFORE, AFTER))
                name = str(dtype).removeprefix("torch.")
                table.add_row(name, str(length), str(rows), f"{before:.0f}", f"{after:.0f}", f"{before / after:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
