"""npu_incre_flash_attention on a CPU: 128 live tokens in a long cache against the same in a short one.

python benchmarks/bench_incre_attention.py
"""

from __future__ import annotations

from functools import partial

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # before torch: then no NPU is needed

import torch  # isort: skip
from timing import medians  # isort: skip

import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu where torch_npu does not

HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64  # of Qwen2-0.5B
LIVE = 128
CACHES = SHORT, LONG = 256, 4096
CALLS = 50


def attend(query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], lengths: list[int]) -> None:
    """One call on BSND tensors."""
    torch.ops.npu.npu_incre_flash_attention(
        query, *cache, num_heads=HEADS, num_key_value_heads=KV_HEADS, scale_value=HEAD_DIM**-0.5,
        input_layout="BSND", actual_seq_lengths=lengths,
    )  # fmt: skip


def new_cache(batch: int, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values."""
    key, value = (torch.randn(batch, slots, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    return key, value


@click.command()
@click.option("--rounds", default=15, help="Rounds of both caches, interleaved; medians are shown.")
@click.option("--threads", default=2)
@torch.no_grad()
def main(rounds: int, threads: int) -> None:
    """Measure one decode step's attention, side by side."""
    torch.set_num_threads(threads)
    table = Table(title=f"{LIVE} live tokens: cache of {LONG} against {SHORT}")
    for heading in ("dtype", "batch", "lengths", f"µs at {SHORT}", f"µs at {LONG}", "ratio"):
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 4):
            for name in ("equal", "ragged")[: 1 if batch == 1 else 2]:
                lengths = [LIVE - (7 * row if name == "ragged" else 0) for row in range(batch)]
                query = torch.randn(batch, 1, HEADS, HEAD_DIM, dtype=dtype)
                short, long = medians(
                    {str(slots): partial(attend, query, new_cache(batch, slots, dtype), lengths) for slots in CACHES},
                    rounds, calls=CALLS,
                ).values()  # fmt: skip
                cells = (str(dtype).removeprefix("torch."), str(batch), name, f"{short * 1e6:.0f}", f"{long * 1e6:.0f}")
                table.add_row(*cells, f"{long / short:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
