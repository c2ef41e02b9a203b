"""Defines torch.ops.npu for every test below, and seeds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_graph_caches() -> Iterator[None]:
    """A graph read from PyTorch's on-disk caches re-evaluates its guards with Python's max(), which compares the rows'
    lengths with each other and so guards on their order: compile counts would depend on earlier runs."""
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        yield
