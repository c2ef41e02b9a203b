"""Products of a few rows with a weight on a CPU: PyTorch's own against what this project does instead.

python benchmarks/bench_small_batch.py
"""

from __future__ import annotations

from collections.abc import Callable

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from torch import nn  # isort: skip
from torch.nn import functional as F  # isort: skip
from timing import medians  # isort: skip

from qwen2_npu.graph import small_batch
from qwen2_npu.models.layers import Linear
from qwen2_npu.ops import linear as linear_module
from qwen2_npu.ops.linear import linear

# Weights (N, K) of Qwen2-0.5B, each with copies that leave the caches.
WEIGHTS = {"gate/up": (9728, 896, 8), "down": (896, 4864, 16), "qkv": (1152, 896, 24), "head": (151936, 896, 1)}
ROWS = (1, 2, 4, 8, 16, 32, 128, 256, 512, 1024)
HEAD_ROWS = 128
"""The head multiplies one row per sequence."""

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Products(nn.Module):
    """The sum of the products of one input with several weights, half of them with a bias."""

    def __init__(self, outputs: int, inputs: int, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.products = nn.ModuleList(Linear(inputs, outputs, bias=i % 2 == 0, dtype=dtype) for i in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([product(x) for product in self.products]).sum(0)


def eager_products(dtype: torch.dtype, numbers_of_rows: tuple[int, ...], rounds: int) -> Table:
    """`ops.linear`, in float32 also for rows that it leaves whole: times as fast as F.linear."""
    linear_module.MAX_ROWS = max(ROWS)
    table = Table(title=f"eager, {dtype}: ops.linear, × F.linear")
    for heading in ("weight", *map(str, numbers_of_rows)):
        table.add_column(heading, justify="right")
    for name, (outputs, inputs, count) in WEIGHTS.items():
        weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(count)]
        cells = []
        for rows in numbers_of_rows:
            if name == "head" and rows > HEAD_ROWS:
                cells.append("")
                continue
            x = torch.randn(rows, inputs, dtype=dtype)

            def every(product: Product, x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                for weight in weights:
                    product(x, weight)

            found = medians({"pytorch": lambda e=every: e(F.linear), "ours": lambda e=every: e(linear)}, rounds)
            cells.append(f"{found['pytorch'] / found['ours']:.2f}")
        table.add_row(f"{name} {outputs} × {inputs}", *cells)
    return table


def fused_loops(rounds: int) -> Table:
    """The compiled graph's loop, also where the pass would take the eager product: rate of reading weights."""
    small_batch._loop_rows = lambda weight: small_batch.MAX_ROWS
    table = Table(title="compiled: GB/s of weights read, eager (ops.linear) and the fused loop")
    for heading in ("dtype", "weight", "rows", "eager", "fused loop"):
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("gate/up", "down", "qkv"):
            outputs, inputs, count = WEIGHTS[name]
            for rows in (1, 2, 4, small_batch.MAX_ROWS):
                torch._dynamo.reset()
                module, x = Products(outputs, inputs, count, dtype), torch.randn(rows, inputs, dtype=dtype)
                options = {"post_grad_custom_pre_pass": small_batch.SmallBatchProducts()}
                loop = torch.compile(module, options=options)
                found = medians({"eager": lambda m=module, x=x: m(x), "loop": lambda f=loop, x=x: f(x)}, rounds)
                rates = [outputs * inputs * count * x.element_size() / 1e9 / seconds for seconds in found.values()]
                table.add_row(str(dtype).removeprefix("torch."), name, str(rows), *(f"{rate:.1f}" for rate in rates))
    return table


@click.command()
@click.option("--rounds", default=9, help="Rounds of every pair; medians are shown.")
@click.option("--threads", default=2)
@torch.no_grad()
def main(rounds: int, threads: int) -> None:
    """Measure products of a few rows, side by side."""
    torch.set_num_threads(threads)
    Console().print(eager_products(torch.float32, ROWS, rounds))
    Console().print(eager_products(torch.bfloat16, (1,), rounds))
    Console().print(fused_loops(rounds))


if __name__ == "__main__":
    main()
