"""Writing a merged, unmerged or quantised folder: a run that is killed at any moment is taken up by the next one.

Every file is written beside its place, read back and compared with what it comes from, and then moved there. The index
and config.json come last: until then the folder is no checkpoint. ``.merging-qkv.json`` in it, or ``.quantizing.json``,
says whose it is, and is locked by the process that writes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen2_npu.checkpoint.byte_ranges import NewFile
from qwen2_npu.checkpoint.configuration import read_object
from qwen2_npu.checkpoint.folder_plan import FolderPlan
from qwen2_npu.checkpoint.folders import locked, sync, try_lock
from qwen2_npu.checkpoint.merge_plan import plan_merge, plan_unmerge
from qwen2_npu.errors import CheckpointError

MB = 1_000_000

Progress = Callable[[str, int, int], None]
"""Told what comes next, megabytes done, megabytes in all: everything is written and then read back."""


def merge_qkv(
    model_path: str | Path, output_path: str | Path, *, tp_size: int = 1, progress: Progress = lambda *state: None
) -> None:
    """Merge q, k and v of the checkpoint in ``model_path``, interleaved for ``tp_size`` ranks, into ``output_path``.

    Raises:
        CheckpointError: what is wrong with one of the folders. What was written is kept for the next run.
        UnsupportedError: a number of ranks that the model cannot be cut for.
    """
    run(plan_merge(model_path, output_path, tp_size=tp_size), progress)


def unmerge_qkv(
    model_path: str | Path,
    output_path: str | Path,
    *,
    assume_tp: int | None = None,
    progress: Progress = lambda *state: None,
) -> None:
    """Restore the ordinary checkpoint that the merged one in ``model_path`` was made of, bit for bit.

    Args:
        assume_tp: for how many ranks it was merged, where it does not record that.

    Raises:
        CheckpointError: what is wrong with one of the folders. What was written is kept for the next run.
        UnsupportedError: ``assume_tp`` contradicts the folder.
    """
    run(plan_unmerge(model_path, output_path, assume_tp=assume_tp), progress)


def run(plan: FolderPlan, progress: Progress = lambda *state: None) -> None:
    """Write the folder of ``plan``.

    Raises:
        CheckpointError: it cannot be written, or what it is made of cannot be read.
    """
    meter = _Meter(progress, 2 * plan.size)
    try:
        check(plan)
        plan.check_replicas()
        with _claimed(plan):
            for file in plan.files:
                if file is plan.last[0]:
                    plan.check_inputs()
                _bring(file, plan, meter)
            (plan.output / plan.mark).unlink()
            sync(plan.output)
    except OSError as error:
        raise _not_written(plan.output, error) from error


def check(plan: FolderPlan) -> None:
    """Refuse an output folder that something else is in, and a disk without room for it.

    Raises:
        CheckpointError: with the way out.
        OSError: it cannot be found out.
    """
    there = _entries(plan.output)
    if plan.mark in there:
        _check_own(plan, there)
    elif others := there - {plan.part}:
        raise CheckpointError(
            f"output path {plan.output} has files in it ({min(others)}, …): nothing is overwritten; name a new folder, "
            "or remove them"
        )
    needed = sum(file.size for file in plan.files if _size(plan.output / file.name) != file.size)
    free = free_bytes(plan.output)
    if free < needed:
        raise CheckpointError(
            f"the disk of {plan.output} has {free / MB:.1f} MB free, and {needed / MB:.1f} MB are needed; free space, "
            "or name a folder on another disk"
        )


def free_bytes(path: Path) -> int:
    """On the disk that ``path`` is on, or will be."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def _check_own(plan: FolderPlan, there: set[str]) -> None:
    own = {plan.mark, plan.part, *(file.name.split("/")[0] for file in plan.files)}
    try:
        same = read_object(plan.output / plan.mark) == _description(plan)
    except CheckpointError:
        same = False
    if not same or there - own:
        raise CheckpointError(
            f"output path {plan.output} holds an interrupted run of another command, or of files that were changed "
            "since: remove it, or name a new folder"
        )


def _description(plan: FolderPlan) -> dict[str, object]:
    """What an interrupted run must have in common with the one that goes on."""
    inputs = {name: list(stamp) for name, stamp in plan.inputs.items()}
    return {"source": str(plan.source.resolve()), "options": plan.options, "inputs": inputs}


@contextmanager
def _claimed(plan: FolderPlan) -> Iterator[None]:
    """Make the output folder and hold it: by a file that is locked, so that readers are not kept waiting."""
    plan.output.mkdir(parents=True, exist_ok=True)
    mark, part = plan.output / plan.mark, plan.output / plan.part
    with ExitStack() as held:
        with locked(plan.output):
            check(plan)  # again: another process may have come first
            if not mark.exists():
                text = json.dumps(_description(plan), indent=2) + "\n"
                with _removed_on_error(part):
                    NewFile(plan.mark, head=text.encode()).write(part)
                    os.replace(part, mark)
                sync(plan.output)
            handle = os.open(mark, os.O_RDWR)
            held.callback(os.close, handle)
            if try_lock(handle) is False:
                raise CheckpointError(f"another process is writing to {plan.output}: wait for it, or name a new folder")
        with _removed_on_error(part):
            yield


@contextmanager
def _removed_on_error(part: Path) -> Iterator[None]:
    """An unfinished file is of no use to anybody, and may be what fills the disk."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _bring(file: NewFile, plan: FolderPlan, meter: _Meter) -> None:
    """Have that file in its place: left as it is where an earlier run has brought it there whole."""
    output = plan.output
    path, part = output / file.name, output / plan.part
    meter.label = f"{file.name}, MB"
    if path.is_file():
        done = meter.done
        if file.same(path, meter.add):
            meter.add(file.size)
            return
        meter.done = done
    file.write(part, meter.add)
    if not file.same(part, meter.add):
        raise CheckpointError(f"{path}: what the disk gives back is not what was written: check the disk and its mount")
    if path.parent != output:
        path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, path)
    sync(path.parent)


class _Meter:
    """How far it has come."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total = progress, total
        self.label, self.done = "", 0

    def add(self, size: int) -> None:
        self.done += size
        self.progress(self.label, self.done // MB, self.total // MB)


def _entries(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _not_written(output: Path, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "free space" if full else "allow writing there, or name another folder"
    return CheckpointError(
        f"cannot write {output}: {error.strerror or error}; {way_out}, and run the same command again: what is "
        "finished is kept"
    )
