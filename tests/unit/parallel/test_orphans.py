"""Which processes a rank that was killed has left behind. Jobs that leave none: tests/unit/parallel/test_monitor.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from qwen2_npu.parallel.orphans import INHERITED, has_parent, inherited

RANK = {"RANK": "3", "WORLD_SIZE": "5", "MASTER_PORT": "29500"}


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """A process with a rank's variables, and what it has started."""
    others = {name: value for name, value in os.environ.items() if name not in INHERITED}
    shell = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo; wait"], env={**others, **RANK}, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    shell.stdout.readline()
    above = psutil.Process(shell.pid)
    below = above.children()
    yield [above, *below]
    for process in (*below, above):
        process.kill()
    shell.communicate()


def test_an_orphan_is_of_the_rank_and_its_parent_is_not(
    family: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    above, below = family
    assert inherited(above) == inherited(below) == RANK
    assert not has_parent(above, RANK), "this process has none of the variables, or another rank's"
    assert has_parent(below, RANK)
    assert not has_parent(below, {**RANK, "RANK": "4"})
