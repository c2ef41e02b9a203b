"""Ways to multiply with an int8 weight on a CPU, in turns: in float32 by blocks or whole, and PyTorch's products.

python benchmarks/bench_int8_products.py
"""

from __future__ import annotations

from collections.abc import Callable

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from timing import CLOCKS, medians  # isort: skip

from qwen2_npu.ops.quantization import integer_product_by_parts, product_by_blocks

SIZES = ("896x4864", "4864x896", "3584x3584", "3584x18944")


def candidates(rows: int, inner: int, columns: int) -> dict[str, Callable[[], object]]:
    """Of one product; the last three are of integers, and exact."""
    weight = torch.randint(-127, 128, (columns, inner), dtype=torch.int8).mT
    x, scale = torch.randn(rows, inner), torch.ones(columns)
    whole = torch.randint(-128, 128, (rows, inner), dtype=torch.int8)
    return {
        "blocks": lambda: product_by_blocks(x, weight),
        "whole": lambda: x @ weight.float(),
        "_weight_int8pack_mm": lambda: torch.ops.aten._weight_int8pack_mm(x, weight.mT, scale),
        "exact, blocks": lambda: integer_product_by_parts(whole, weight),
        "_int_mm": lambda: torch._int_mm(whole, weight),
        "float64": lambda: whole.double() @ weight.double(),
    }


@click.command()
@click.option("--size", "sizes", multiple=True, default=SIZES, help="K x N of the weight.")
@click.option("--rows", multiple=True, default=[1, 4, 16], type=int)
@click.option("--rounds", default=9, help="Calls of each way, in turns; medians are shown.")
@click.option("--threads", default=1)
@click.option("--clock", default="cpu", type=click.Choice(list(CLOCKS)), help="cpu: of one thread on a busy machine.")
@torch.no_grad()
def main(sizes: tuple[str, ...], rows: tuple[int, ...], rounds: int, threads: int, clock: str) -> None:
    """Measure products of float32 rows, and of int8 rows, with int8 weights."""
    torch.set_num_threads(threads)
    table = Table(title=f"milliseconds, {threads} threads, {clock} clock, medians of {rounds}")
    for size in sizes:
        inner, columns = map(int, size.split("x"))
        for count in rows:
            found = medians(candidates(count, inner, columns), rounds, clock=CLOCKS[clock])
            if not table.columns:
                for heading in ("K x N", "rows", *found):
                    table.add_column(heading, justify="right")
            table.add_row(size, str(count), *(f"{1e3 * taken:.2f}" for taken in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
