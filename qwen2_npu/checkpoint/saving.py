"""Replacing the checkpoint in a folder: at any moment it loads as the old one or the new one, or is refused.

Everything is written into ``.saving-…`` inside the folder first. Then one step makes the new weights the ones that are
read, by this project and by transformers alike: moving ``model.safetensors`` or its index into place, or removing the
``model.safetensors`` that readers prefer to an index. For that step to be the only one that counts,

- old shards that new ones would overwrite are linked into ``.saving-…`` before, and the old index names them there;
- a config.json or generation_config.json that changes does so while there is no config.json, and nothing is loaded.

A failure undoes what was done. A kill leaves ``.saving-…`` behind, for the next save to remove.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen2_npu.checkpoint.configuration import CONFIG_FILE, GENERATION_CONFIG_FILE, read_object
from qwen2_npu.checkpoint.folders import SAVING, locked, try_lock
from qwen2_npu.checkpoint.folders import sync as _sync
from qwen2_npu.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from qwen2_npu.errors import CheckpointError

LOCK_FILE = "lock"
"""In ``.saving-…``, locked by the process that writes there. (Network file systems have locks for files alone.)"""

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class NotRestoredError(OSError):
    """A save failed, and what it had done could not be undone."""


def replace_checkpoint(folder: Path, write: Callable[[Path], None]) -> None:
    """Put the files that ``write`` makes in an empty folder in place of the checkpoint in ``folder``.

    Raises:
        NotRestoredError: it failed, and what was there could not be restored.
        OSError: it failed, and what was there is unchanged.
    """
    with _made(folder), _staging(folder) as staging:
        new = staging / "new"
        new.mkdir()
        write(new)
        mode = stat.S_IMODE((staging / LOCK_FILE).stat().st_mode)  # what new files have by the umask
        for path in new.iterdir():
            if stat.S_IMODE(path.stat().st_mode) != mode:  # safetensors lets only their owner read its files
                path.chmod(mode)
            _sync(path)
        _sync(new)
        with locked(folder) as alone:
            _Exchange(folder, staging, new).run()
            _remove_leftovers(folder, alone)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make ``folder`` unless it is there; a failure removes what was made."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if made:
        with suppress(PermissionError):  # its parent may not be readable
            _sync(folder.parent)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


# ---- the folder beside -----------------------------------------------------------------------------------------------
@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A new ``.saving-…``, locked for as long as it is used: others may be saving to ``folder``, too."""
    with locked(folder) as alone:
        _remove_leftovers(folder, alone)
        staging = folder / f"{SAVING}{secrets.token_hex(4)}"
        staging.mkdir()
        handle = os.open(staging / LOCK_FILE, os.O_RDWR | os.O_CREAT, mode=0o666)
        try_lock(handle)
    try:
        yield staging
        _remove(staging)
    except NotRestoredError:
        raise
    except BaseException:
        _remove(staging)
        raise
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path, alone: bool) -> None:
    """Remove what killed saves left.

    Args:
        alone: nobody can be about to lock what has no lock yet.
    """
    for path in folder.glob(f"{SAVING}*"):
        with suppress(OSError):
            handle = os.open(path / LOCK_FILE, os.O_RDWR | (os.O_CREAT if alone else 0))
            try:
                if try_lock(handle):
                    _remove(path)
            finally:
                os.close(handle)


def _remove(staging: Path) -> None:
    """Remove a ``.saving-…`` unless the index names shards in it."""
    with suppress(OSError):
        if not any(file.startswith(f"{staging.name}/") for file in _weight_map(staging.parent).values()):
            shutil.rmtree(staging)


def _weight_map(folder: Path) -> dict[str, str]:
    """Which tensor is in which file, by the index of ``folder``; empty where no valid one is there."""
    try:
        weight_map = read_object(folder / INDEX_FILE).get("weight_map")
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from error
        return {}
    if isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
        return weight_map
    return {}


# ---- the exchange ----------------------------------------------------------------------------------------------------
class _Exchange:
    """Moves the files of ``new`` into ``folder``, which is locked. What is replaced is kept in ``staging``."""

    def __init__(self, folder: Path, staging: Path, new: Path) -> None:
        self.folder, self.staging, self.new = folder, staging, new
        self.old = staging / "old"
        self.kept = 0
        self.undo = ExitStack()

    def run(self) -> None:
        self.old.mkdir()
        try:
            self._exchange()
        except BaseException as error:
            try:
                self.undo.close()
            except BaseException as second:
                raise NotRestoredError(
                    f"{error}, and then what was there could not be restored: {second}. Its files are in {self.old}"
                ) from error
            raise

    def _exchange(self) -> None:
        written = {path.name for path in self.new.iterdir()}
        shards = sorted(filter(SHARD.fullmatch, written))
        others = sorted(written - {*shards, CONFIG_FILE, INDEX_FILE, SINGLE_FILE})
        stale = sorted(path.name for path in self.folder.iterdir() if SHARD.fullmatch(path.name))
        if not (self.folder / SINGLE_FILE).exists():
            self._move_aside(shards)
        self._put(shards)
        # Closed, the folder is loaded by nobody.
        closed = any(self._differs(name) for name in (CONFIG_FILE, GENERATION_CONFIG_FILE))
        if closed:
            self._drop([CONFIG_FILE])
            self._drop({GENERATION_CONFIG_FILE} - written)
            self._put(others)
        # Of these two, the second counts where there is a model.safetensors before or after; else the first.
        self._put({INDEX_FILE, SINGLE_FILE} & written)
        self._drop({INDEX_FILE, SINGLE_FILE} - written)
        if closed:
            self._put([CONFIG_FILE])
        self._drop(set(stale) - written)

    def _move_aside(self, shards: Sequence[str]) -> None:
        """Have the index name links to those of its files that ``shards`` would overwrite."""
        weight_map = _weight_map(self.folder)
        overwritten = set(weight_map.values()).intersection(shards)
        if not all((self.folder / name).exists() for name in weight_map.values()):
            self._drop([INDEX_FILE])  # shards are missing: it is to stay unusable when new ones get their names
            return
        if not overwritten:
            return
        for name in overwritten:
            _link((self.folder / name).resolve(strict=True), self.old / name)
        _sync(self.old)
        aside = f"{self.staging.name}/{self.old.name}"
        index = {
            "metadata": {},
            "weight_map": {
                tensor: f"{aside}/{file}" if file in overwritten else file for tensor, file in weight_map.items()
            },
        }
        path = self.staging / INDEX_FILE
        path.write_text(json.dumps(index), encoding="utf-8")
        _sync(path)
        _sync(self.staging)
        self._put([INDEX_FILE], source=self.staging)

    def _differs(self, name: str) -> bool:
        old, new = self.folder / name, self.new / name
        return (old.read_bytes() if old.exists() else None) != (new.read_bytes() if new.exists() else None)

    def _put(self, names: Sequence[str] | set[str], source: Path | None = None) -> None:
        """Move files in, one after the other, and make that last."""
        for name in names:
            path = self.folder / name
            if not self._keep(path):
                self.undo.callback(path.unlink, missing_ok=True)
            os.replace((source or self.new) / name, path)
        if names:
            _sync(self.folder)

    def _drop(self, names: Sequence[str] | set[str]) -> None:
        """Remove files, where there are any, and make that last."""
        for name in names:
            if self._keep(self.folder / name):
                (self.folder / name).unlink()
        if names:
            _sync(self.folder)

    def _keep(self, path: Path) -> bool:
        """Link ``path`` to where a failure takes it back from; False where there is nothing."""
        if not os.path.lexists(path):
            return False
        kept = self.old / f"{self.kept}-{path.name}"
        self.kept += 1
        if path.is_symlink():
            kept.symlink_to(os.readlink(path))
        else:
            _link(path, kept)
        self.undo.callback(os.replace, kept, path)
        return True


def _link(path: Path, to: Path) -> None:
    """Give a file a second name."""
    try:
        os.link(path, to)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copy2(path, to)  # a file system without hard links
        _sync(to)
