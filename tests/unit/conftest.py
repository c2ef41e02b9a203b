"""What several unit tests need around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch has two threads, whatever the machine and the session."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
