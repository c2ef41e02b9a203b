"""What several unit tests need around them."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# A shell starts what it puts into the background with SIGINT ignored, and so does some CI: tests of Ctrl-C, and the
# programs that they start, would never see one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hangups() -> Iterator[None]:
    """A terminal that closes ends programs, though this session may be under nohup, which they would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch has two threads, whatever the machine and the session."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
