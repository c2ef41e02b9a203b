"""What needs emulated cards in this process is left out where there are none, or real ones."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_npu import emulator

if not emulator.is_active():
    collect_ignore_glob = [
        "eager/*.py",
        "eager/operators/*.py",
        "eager/operators/beyond_qwen2/*.py",
        "test_runtime.py",
        "test_faults.py",
    ]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of this user's that every user can read, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="qwen2_npu-test-"))
    folder.chmod(0o755)
    if not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
        folder.rmdir()
        pytest.skip(f"other users have no access to {folder.parent}")
    yield folder
    shutil.rmtree(folder)
