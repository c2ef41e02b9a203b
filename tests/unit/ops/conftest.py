"""Defines torch.ops.npu for every test below, and seeds it."""

from __future__ import annotations

import pytest
import torch

import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
