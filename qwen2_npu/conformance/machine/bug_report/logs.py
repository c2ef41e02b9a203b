"""What the driver and CANN say: versions, `npu-smi info`, and the errors in the newest log files."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ASCEND = Path("/usr/local/Ascend")
VERSION_FILES = (
    "driver/version.info",
    "firmware/version.info",
    "ascend-toolkit/latest/version.cfg",
    "version.info",
)
COMMANDS = {"npu-smi.txt": ("npu-smi", "info"), "compiler.txt": ("cc", "--version")}
"""File of the archive -> command whose output it holds, where the command exists."""

NEWEST, LINES = 4, 400
"""Log files that are read, and lines kept of each."""

_WORTH_KEEPING = re.compile(r"\[(ERROR|WARNING)\]")


def versions(ascend: Path = ASCEND) -> Iterator[tuple[str, str]]:
    """Name in the archive and content of every version file there is."""
    for name in VERSION_FILES:
        text = _read(ascend / name)
        if text is not None:
            yield f"versions/{name.replace('/', '-')}.txt", text


def commands() -> Iterator[tuple[str, str]]:
    """Name in the archive and output of every command there is."""
    for name, command in COMMANDS.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError):
            continue
        yield name, done.stdout + done.stderr


def cann(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Name in the archive and the errors and warnings of CANN's newest logs. Their other lines hold too much."""
    root = folder or Path(os.environ.get("ASCEND_PROCESS_LOG_PATH") or Path.home() / "ascend" / "log")
    found = sorted(root.rglob("*.log"), key=_age)[:NEWEST]
    for index, path in enumerate(found):
        text = _read(path) or ""
        lines = [line for line in text.splitlines() if _WORTH_KEEPING.search(line)]
        yield f"logs/{index}-{path.name}", "\n".join(lines[-LINES:]) + "\n"


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
