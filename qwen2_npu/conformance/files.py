"""Files that are either whole or absent, and where the committed baselines are."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import qwen2_npu

BASELINES = Path(qwen2_npu.__file__).parents[1] / "baselines"
"""The repository's folder of baselines; an installed wheel has none."""


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that its result could not be written.

    Raises:
        OSError: naming ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"{path} cannot be written ({error.strerror or error}): name another place") from error


def write_json(path: Path, content: Any) -> None:
    """Write beside ``path`` and move into place. Numbers that JSON has no name for become strings ("nan", "inf").

    Raises:
        OSError: the folder cannot be made or written; ``path`` is then as it was.
    """
    write_text(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside ``path`` and move into place.

    Raises:
        OSError: the folder cannot be made or written; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """``value`` with the numbers that JSON has no name for as strings, and tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
