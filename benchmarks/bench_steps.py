"""Prefill or decode on a CPU at two steps of the ladder: one model's two forms, in turns.

python benchmarks/bench_steps.py
python benchmarks/bench_steps.py --phase decode --before last_layer --after kv_scatter
"""

from __future__ import annotations

from collections.abc import Callable
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
from qwen2_npu.optimizations import LADDER, PHASES

SIZE = "0.5B"
DECODED = 8
"""Steps of one measurement of decode, after which the cache goes back to the prompt."""


def prefill(model: Any, tokens: torch.Tensor) -> None:
    """One prompt, of which the last logits are kept."""
    model(tokens, past_key_values=model.allocate_cache(*tokens.shape), logits_to_keep=1)


def decoding(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """Decode steps after a prompt."""
    rows, length = tokens.shape
    cache = model.allocate_cache(rows, length + DECODED)
    model(tokens, past_key_values=cache, logits_to_keep=1)

    def run() -> None:
        for _ in range(DECODED):
            model(tokens[:, :1], past_key_values=cache)
        cache.crop(-DECODED)

    return run


@click.command()
@click.option("--before", type=click.Choice(LADDER), default="swiglu")
@click.option("--after", type=click.Choice(LADDER), default="last_layer")
@click.option("--phase", type=click.Choice(PHASES), default="prefill")
@click.option("--rounds", default=5, help="Rounds of both, interleaved; medians are shown.")
@click.option("--threads", default=2)
@click.option("--layers", default=SIZES[SIZE].layers, help="Fewer than the model has.")
@click.option("--tokens", default="128,1024", help="Of the prompts.")
@click.option("--batch", default="1,4")
@torch.no_grad()
def main(before: str, after: str, phase: str, rounds: int, threads: int, layers: int, tokens: str, batch: str) -> None:
    """Measure a Qwen2-0.5B-shaped model, side by side."""
    torch.set_num_threads(threads)
    weights = Weights(replace(SIZES[SIZE], layers=layers))
    table = Table(title=f"{phase}, {layers} layers: {after} against {before}")
    for heading in ("dtype", "prompt", "batch", f"ms {before}", f"ms {after}", "ratio"):
        table.add_column(heading, justify="right")
    steps = 1 if phase == "prefill" else DECODED
    for dtype in (torch.float32, torch.bfloat16):
        models = {
            step: weights.build(Configuration(SIZE, 1, 1, "eager", step), "cpu", dtype) for step in (before, after)
        }
        for length in map(int, tokens.split(",")):
            for rows in map(int, batch.split(",")):
                given = torch.ones(rows, length, dtype=torch.int64)
                measured = {
                    step: partial(prefill, model, given) if phase == "prefill" else decoding(model, given)
                    for step, model in models.items()
                }
                found = medians(measured, rounds)
                one, other = (found[step] * 1e3 / steps for step in (before, after))
                name = str(dtype).removeprefix("torch.")
                table.add_row(name, str(length), str(rows), f"{one:.2f}", f"{other:.2f}", f"{one / other:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
