"""Files that are either whole or absent, and where the committed baselines are."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qwen2_npu

BASELINES = Path(qwen2_npu.__file__).parents[1] / "baselines"
"""The repository's folder of baselines; an installed wheel has none."""

WAYS_OUT = {
    errno.EACCES: "change the permissions of its folder",
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free space in your disk quota",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What to do instead of choosing another place, by the number of the error."""

ELSEWHERE = "name another place"


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that its result could not be written.

    Raises:
        OSError: naming ``path``, and what to do.
    """
    with explained(path):
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass


def check_folder(folder: Path) -> None:
    """The same for a folder in which files will be made. It is made where there is none.

    Raises:
        OSError: naming ``folder``, and what to do.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_json(path: Path, content: Any) -> None:
    """Write beside ``path`` and move into place. Numbers that JSON cannot hold become strings ("nan", "inf").

    Raises:
        OSError: naming ``path``, and what to do; the file is then as it was.
    """
    write_text(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside ``path`` and move into place. Characters that UTF-8 cannot hold are written as ``\\udXXX``.

    Raises:
        OSError: naming ``path``, and what to do; the file is then as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, which takes its place when the block ends without an error.

    Raises:
        OSError: naming ``path``, and what to do; the file is then as it was.
    """
    with explained(path):
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            yield temporary
            os.fsync(handle)  # else a crash of the machine could leave an empty file in the place of the old one
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)


def read_json(path: Path) -> Any:
    """The content of a JSON file, in which only standard numbers may stand.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not UTF-8, nested too deeply, or holds text that is not Unicode.
    """
    if not path.is_file() and path.exists():
        raise ValueError("it is not a regular file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    try:
        content = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is not Unicode text") from error
    return content


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is not valid JSON")


def why(error: OSError) -> str:
    """The reason alone, without the number and the path that Python puts around it."""
    return error.strerror or str(error)


def not_written(path: Path, error: OSError, elsewhere: str = ELSEWHERE) -> str:
    """That ``path`` is not written, why, and what to do; an error that says so already is left as it is.

    Args:
        elsewhere: how the user chooses another place.
    """
    if error.errno is None:
        return str(error)
    way_out = WAYS_OUT.get(error.errno)
    return f"{path} cannot be written ({why(error)}): {f'{way_out}, or ' if way_out else ''}{elsewhere}"


@contextmanager
def explained(path: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Errors of the operating system name ``path`` and say what to do.

    Raises:
        OSError: what went wrong within, with the text of :func:`not_written`.
    """
    try:
        yield
    except OSError as error:
        raise type(error)(not_written(path, error, elsewhere)) from error


def _check_replaceable(path: Path) -> None:
    """That a file could stand in the place of what is at ``path``."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a device or a pipe: name a regular file")
    if path.exists():
        folder = path.parent.stat()
        # As in /tmp: only its owner, or the folder's, may replace a file.
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, folder.st_uid, path.lstat().st_uid):
            raise PermissionError(errno.EPERM, "the file of that name belongs to another user")


def plain(value: Any) -> Any:
    """``value`` with the numbers that JSON cannot hold as strings, and tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
