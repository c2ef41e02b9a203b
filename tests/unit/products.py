"""What a product of a weight in float32 may be off by."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def assert_exact(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """`got` is the float64 product within what float32 sums may lose, in whatever order they are taken."""
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
    exact = F.linear(*wide)  # type: ignore[arg-type]
    magnitude = F.linear(*(None if tensor is None else tensor.abs() for tensor in wide))  # type: ignore[arg-type]
    additions = weight.shape[1] + (bias is not None)
    assert ((got.double() - exact).abs() <= additions * torch.finfo(torch.float32).eps * magnitude).all()
