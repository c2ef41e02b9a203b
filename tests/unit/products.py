"""What a product with a weight may be off by."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def assert_exact(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """`got` is the float64 product within what float32 sums may lose, in any order, and one rounding to the dtype."""
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
    exact = F.linear(*wide)  # type: ignore[arg-type]
    magnitude = F.linear(*(None if tensor is None else tensor.abs() for tensor in wide))  # type: ignore[arg-type]
    additions = weight.shape[1] + (bias is not None)
    sums = additions * torch.finfo(torch.float32).eps * magnitude
    rounding = 0 if got.dtype == torch.float32 else (exact.abs() + sums) * torch.finfo(got.dtype).eps / 2
    assert ((got.double() - exact).abs() <= sums + rounding).all()
