"""A save that fails at any point leaves the files that were there: all of it in the fast lane, with texts for files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2_npu.checkpoint.configuration import CONFIG_FILE, GENERATION_CONFIG_FILE
from qwen2_npu.checkpoint.saving import replace_checkpoint
from qwen2_npu.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from tests.unit.checkpoint.test_saving import content, interrupted

LAYOUTS = {"single": 1, "several": 2, "many": 3}
"""Names of layouts -> files of weights."""


def writer(layout: str, text: str, *beside: str) -> Callable[[Path], None]:
    count = LAYOUTS[layout]
    shards = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]

    def write(folder: Path) -> None:
        for name in (*beside, *([SINGLE_FILE] if count == 1 else shards)):
            (folder / name).write_text(text)
        if count > 1:
            weight_map = {f"{text} {name}": name for name in shards}
            (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.mark.parametrize("configured", [False, True], ids=["weights", "configuration"])
@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", [*LAYOUTS, None])
def test_what_was_there_is_there_again(
    before: str | None, after: str, configured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old files with their old content, and no new ones, whichever change of the folder fails."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of files, on a disk that others use, too
    beside = (CONFIG_FILE, GENERATION_CONFIG_FILE) if configured else ()
    failed = 0
    for at in range(1, 101):
        folder = tmp_path / str(at)
        folder.mkdir()
        if before is not None:
            writer(before, "old", *beside)(folder)
        old = content(folder)
        with interrupted(at, lambda: OSError(errno.ENOSPC, "No space left"), for_good=False) as done:
            try:
                replace_checkpoint(folder, writer(after, "new", *beside[:1]))
            except OSError:
                assert content(folder) == old, done
                failed += 1
        if len(done) < at:
            break
    assert 1 < failed < at < 100
