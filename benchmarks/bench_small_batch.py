"""Weight-read rate of products of a few rows on a CPU: BLAS against the fused loop of ``graph/small_batch.py``.

python benchmarks/bench_small_batch.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from qwen2_npu.graph.small_batch import SmallBatchProducts

OUT, IN, PRODUCTS = 9728, 896, 8  # the fused gate/up weight of Qwen2-0.5B, often enough to leave the caches


class Products(nn.Module):
    """The sum of eight products, half of them with a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.products = nn.ModuleList(nn.Linear(IN, OUT, bias=i % 2 == 0, dtype=dtype) for i in range(PRODUCTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([product(x) for product in self.products]).sum(0)


def rate(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """GB of weights per second: the median of ten calls after two."""
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - start)
    return OUT * IN * PRODUCTS * x.element_size() / statistics.median(seconds[2:]) / 1e9


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 2, 4, 8):
            torch._dynamo.reset()
            module, x = Products(dtype), torch.randn(rows, IN, dtype=dtype)
            fused = torch.compile(module, options={"post_grad_custom_pre_pass": SmallBatchProducts()})
            print(f"{dtype} {rows} rows: BLAS {rate(module, x):.1f} GB/s, fused loop {rate(fused, x):.1f} GB/s")


if __name__ == "__main__":
    main()
