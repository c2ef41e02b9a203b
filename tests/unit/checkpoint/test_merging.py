"""A merge that is killed or fails at any point: never a checkpoint that is half written, and the next run ends it."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import byte_ranges, merging
from qwen2_npu.checkpoint.byte_ranges import NewFile
from qwen2_npu.checkpoint.folders import MERGING, MERGING_PART
from qwen2_npu.checkpoint.merge_plan import plan_merge
from qwen2_npu.checkpoint.merging import merge_qkv, unmerge_qkv
from qwen2_npu.errors import CheckpointError
from tests.unit.checkpoint.merges import config_of, digest, open_below, weights_of, write_folder
from tests.unit.memory import least_peak

CONFIG = config_of(4, 2, layers=1)

CHANGES = ("write", "replace", "mkdir", "unlink", "fsync")
"""Functions of ``os`` through which a merge changes the disk."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Killed(BaseException):
    """In place of SIGKILL: from here on no change succeeds, whatever is tried to clean up."""


@contextmanager
def interrupted(at: int, error: Callable[[], BaseException], *, for_good: bool) -> Iterator[list[str]]:
    """The change number ``at`` fails, a write after half of it, and with ``for_good`` all after it, too; none for 0.

    Yields:
        The changes so far.
    """
    done: list[str] = []

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == at and name == "write":
                function(args[0], bytes(args[1])[: len(args[1]) // 2])
            if at and (len(done) == at or (for_good and len(done) > at)):
                raise error()
            return None if name == "fsync" else function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        yield done


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("merging") / "ordinary", CONFIG, weights_of(CONFIG), shards=2)


@pytest.fixture(scope="module")
def merged(origin: Path) -> Path:
    merge_qkv(origin, origin.parent / "merged", tp_size=2)
    return origin.parent / "merged"


def direction(origin: Path, merged: Path, unmerge: bool) -> tuple[Callable[[Path], None], Path]:
    """The run, and the folder that it is to make."""
    if unmerge:
        return lambda output: unmerge_qkv(merged, output), origin
    return lambda output: merge_qkv(origin, output, tp_size=2), merged


def number_of_changes(run: Callable[[Path], None], output: Path) -> int:
    with interrupted(0, Killed, for_good=True) as done:
        run(output)
    return len(done)


# ---- killed ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unmerge", [False, True], ids=["merge", "unmerge"])
def test_killed_at_every_change_and_run_again(unmerge: bool, origin: Path, merged: Path, tmp_path: Path) -> None:
    run, expected = direction(origin, merged, unmerge)
    changes = number_of_changes(run, tmp_path / "whole")
    assert digest(tmp_path / "whole") == digest(expected)
    assert changes > 30
    complete = 0
    for at in range(1, changes + 1):
        output = tmp_path / str(at)
        with pytest.raises(Killed), interrupted(at, Killed, for_good=True):
            run(output)
        if (output / "config.json").exists():  # nothing but the mark is left to be removed
            complete += 1
            assert digest(output).items() >= digest(expected).items()
        elif output.exists():
            with pytest.raises(CheckpointError, match=r"has no config\.json"):
                Qwen2ForCausalLM.from_pretrained(output)
        if not (output / "config.json").exists() or (output / MERGING).exists():
            run(output)
        assert digest(output) == digest(expected), f"killed at change {at}"
    assert 0 < complete < 5


def test_killed_again_and_again(origin: Path, merged: Path, tmp_path: Path) -> None:
    """Each run gets a little further: finished files are not begun anew."""
    for _ in range(100):
        try:
            with interrupted(30, Killed, for_good=True):
                merge_qkv(origin, tmp_path / "merged", tp_size=2)
            break
        except Killed:
            continue
    assert digest(tmp_path / "merged") == digest(merged)


def test_finished_files_are_kept(origin: Path, tmp_path: Path) -> None:
    """Those in subfolders, too."""
    folder, output = Path(shutil.copytree(origin, tmp_path / "ordinary")), tmp_path / "merged"
    (folder / "assets").mkdir()
    (folder / "assets" / "a").write_text("a")
    finished = [output / "model-00001-of-00002.safetensors", output / "assets" / "a"]
    count = number_of_changes(lambda output: merge_qkv(folder, output, tp_size=2), tmp_path / "whole")
    with pytest.raises(Killed), interrupted(count - 8, Killed, for_good=True):
        merge_qkv(folder, output, tp_size=2)
    before = [path.stat() for path in finished]
    merge_qkv(folder, output, tp_size=2)
    after = [path.stat() for path in finished]
    assert [(each.st_ino, each.st_mtime_ns) for each in after] == [(each.st_ino, each.st_mtime_ns) for each in before]


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:-1] + b"?", lambda data: b""])
def test_finished_files_are_checked(
    damage: Callable[[bytes], bytes], origin: Path, merged: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    count = number_of_changes(lambda output: merge_qkv(origin, output, tp_size=2), tmp_path / "whole")
    with pytest.raises(Killed), interrupted(count - 8, Killed, for_good=True):
        merge_qkv(origin, output, tp_size=2)
    shard = output / "model-00001-of-00002.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    merge_qkv(origin, output, tp_size=2)
    assert digest(output) == digest(merged)


def test_an_interrupted_folder_is_no_checkpoint(origin: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    count = number_of_changes(lambda output: merge_qkv(origin, output), tmp_path / "whole")
    with pytest.raises(Killed), interrupted(count - 4, Killed, for_good=True):
        merge_qkv(origin, output)
    assert MERGING in os.listdir(output)
    with pytest.raises(CheckpointError, match="qwen2-npu merge-qkv was interrupted, or is under way: run the same"):
        Qwen2ForCausalLM.from_pretrained(output)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(output)


CHILD = """
import sys
from qwen2_npu.checkpoint import byte_ranges, merging
byte_ranges.CHUNK = 512
print("begin", flush=True)
merging.merge_qkv(sys.argv[1], sys.argv[2], tp_size=2)
"""


@pytest.mark.slow
def test_real_kills(tmp_path: Path) -> None:
    config = config_of(64, 8, layers=6)
    origin = write_folder(tmp_path / "ordinary", config, weights_of(config), shards=5)
    merge_qkv(origin, tmp_path / "expected", tp_size=2)
    chance, killed = random.Random(0), 0
    for attempt in range(8):
        output = tmp_path / str(attempt)
        for _ in range(chance.randint(1, 2)):
            with subprocess.Popen([sys.executable, "-c", CHILD, origin, output], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(chance.uniform(0, 0.1))
                process.kill()
            killed += process.returncode != 0
            if (output / "config.json").exists():
                break
        if not (output / "config.json").exists() or (output / MERGING).exists():
            merge_qkv(origin, output, tp_size=2)
        assert digest(output) == digest(tmp_path / "expected")
    assert killed > 4


# ---- failures --------------------------------------------------------------------------------------------------------
def test_a_full_disk_at_every_change(origin: Path, merged: Path, tmp_path: Path) -> None:
    changes = number_of_changes(lambda output: merge_qkv(origin, output, tp_size=2), tmp_path / "whole")
    said: list[str] = []
    for at in range(1, changes + 1):
        output = tmp_path / str(at)
        with interrupted(at, lambda: OSError(errno.ENOSPC, "No space left on device"), for_good=False):
            try:
                merge_qkv(origin, output, tp_size=2)
            except CheckpointError as error:
                said.append(str(error).removeprefix(f"cannot write {output}: "))
        assert not (output / MERGING_PART).exists(), "what is of no use takes no space"
        if not (output / "config.json").exists() or (output / MERGING).exists():
            merge_qkv(origin, output, tp_size=2)
        assert digest(output) == digest(merged)
    assert set(said) == {
        "No space left on device; free space, and run the same command again: what is finished is kept"
    }
    assert len(said) > changes - 5


def test_too_little_space_is_found_before(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(origin, tmp_path / "a" / "merged")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, plan.size - 1))
    with pytest.raises(CheckpointError, match=r"has 0\.0 MB free, and 0\.0 MB are needed; free space, or name"):
        merging.run(plan)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, plan.size))
    merging.run(plan)


def test_what_is_there_already_needs_no_space(
    origin: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = number_of_changes(lambda output: merge_qkv(origin, output, tp_size=2), tmp_path / "whole")
    with pytest.raises(Killed), interrupted(count - 4, Killed, for_good=True):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 2000))
    merge_qkv(origin, tmp_path / "merged", tp_size=2)
    assert digest(tmp_path / "merged") == digest(merged)


def test_a_disk_that_gives_back_something_else(
    origin: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = NewFile.write

    def lossy(self: NewFile, path: Path, moved: Any = lambda size: None) -> None:
        real(self, path, moved)
        if self.name.endswith(".safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(NewFile, "write", lossy)
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: what the disk gives back is not what was"):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)
    assert os.listdir(tmp_path / "merged") == [MERGING]
    monkeypatch.undo()
    merge_qkv(origin, tmp_path / "merged", tp_size=2)
    assert digest(tmp_path / "merged") == digest(merged)


def test_nothing_is_moved_in_that_a_power_cut_could_take(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is synchronised and dropped from memory, so that the disk is read; then moved in, for good."""
    folder, output = Path(shutil.copytree(origin, tmp_path / "ordinary")), tmp_path / "merged"
    (folder / "assets").mkdir()
    (folder / "assets" / "a").write_text("a")
    done: list[tuple[object, ...]] = []

    def path_of(handle: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{handle}"))

    def replace(source: Path, target: Path, really: Callable[..., None] = os.replace) -> None:
        done.append(("replace", source, target))
        really(source, target)

    def unlink(path: Path, really: Callable[..., None] = os.unlink) -> None:
        done.append(("unlink", path))
        really(path)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("fsync", path_of(handle))))
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *advice: done.append(("drop", path_of(handle), *advice)))
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", unlink)
    merge_qkv(folder, output)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    others = ["LICENSE", "tokenizer_config.json", "assets/a"]
    part, everything = output / MERGING_PART, (0, 0, os.POSIX_FADV_DONTNEED)
    expected: list[tuple[object, ...]] = []
    for name in [MERGING, *shards, *others, "model.safetensors.index.json", "config.json"]:
        path = output / name
        expected += [("fsync", part), ("drop", part, *everything), ("replace", part, path), ("fsync", path.parent)]
    assert done == [*expected, ("unlink", output / MERGING), ("fsync", output)]


def test_no_file_stays_open(origin: Path, tmp_path: Path) -> None:
    merge_qkv(origin, tmp_path / "merged")
    unmerge_qkv(tmp_path / "merged", tmp_path / "unmerged")
    gc.collect()  # what safetensors has open goes with its objects
    assert not open_below(tmp_path, origin)


@pytest.mark.parametrize("umask", [0o022, 0o007], ids=oct)
def test_who_may_read_it_is_up_to_the_umask(umask: int, origin: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        merge_qkv(origin, tmp_path / "merged")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in (tmp_path / "merged").iterdir()} == {0o666 & ~umask}


def test_an_input_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = write_folder(tmp_path / "ordinary", CONFIG, weights_of(CONFIG), shards=2)
    output = tmp_path / "merged"
    plan = plan_merge(origin, output)
    os.utime(origin / "model-00001-of-00002.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors was changed meanwhile: remove "):
        merging.run(plan)
    assert not (output / "config.json").exists()
    with pytest.raises(CheckpointError, match="an interrupted run of another command, or of files that were changed"):
        merge_qkv(origin, output)


# ---- what is there already -------------------------------------------------------------------------------------------
def test_nothing_is_overwritten(origin: Path, merged: Path, tmp_path: Path) -> None:
    before = digest(merged)
    with pytest.raises(CheckpointError, match=r"has files in it \(LICENSE, …\): nothing is overwritten; name a new"):
        merge_qkv(origin, merged, tp_size=2)
    assert digest(merged) == before
    (tmp_path / "empty").mkdir()
    merge_qkv(origin, tmp_path / "empty", tp_size=2)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file: Not a directory; .* name another folder"):
        merge_qkv(origin, tmp_path / "file")


@pytest.mark.parametrize("tp_size", [1, 4])
def test_an_interrupted_run_of_other_options(tp_size: int, origin: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed), interrupted(12, Killed, for_good=True):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)
    before = digest(tmp_path / "merged")
    with pytest.raises(CheckpointError, match="holds an interrupted run of another command"):
        merge_qkv(origin, tmp_path / "merged", tp_size=tp_size)
    (tmp_path / "merged" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="holds an interrupted run of another command"):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)
    (tmp_path / "merged" / "mine.txt").unlink()
    assert digest(tmp_path / "merged") == before
    (tmp_path / "merged" / MERGING).write_text("{")
    with pytest.raises(CheckpointError, match="holds an interrupted run of another command"):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)


def test_two_at_once(origin: Path, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed), interrupted(12, Killed, for_good=True):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)
    with (tmp_path / "merged" / MERGING).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a run that fails has let go of it
        with pytest.raises(
            CheckpointError, match=r"another process is writing to .*merged: wait for it, or name a new"
        ):
            merge_qkv(origin, tmp_path / "merged", tp_size=2)
    merge_qkv(origin, tmp_path / "merged", tp_size=2)
    assert digest(tmp_path / "merged") == digest(merged)


def test_a_file_system_without_locks(
    origin: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network ones: nobody is kept out, and all else is as elsewhere."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Killed), interrupted(12, Killed, for_good=True):
        merge_qkv(origin, tmp_path / "merged", tp_size=2)
    merge_qkv(origin, tmp_path / "merged", tp_size=2)
    assert digest(tmp_path / "merged") == digest(merged)


# ---- other users -----------------------------------------------------------------------------------------------------
def said_to_nobody(action: Callable[[], object]) -> str:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        message = "no error"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    return message


@as_root
def test_files_and_folders_of_another_user(origin: Path) -> None:
    with tempfile.TemporaryDirectory() as above:
        folder = Path(shutil.copytree(origin, Path(above, "model")))
        for path in (Path(above), folder):
            path.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
        free = Path(above, "free")
        free.mkdir(mode=0o777)
        free.chmod(0o777)
        message = said_to_nobody(lambda: merge_qkv(folder, Path(above, "merged")))
        assert message.startswith(f"CheckpointError: cannot write {above}/merged: Permission denied; allow writing")
        for name in ("LICENSE", "model-00002-of-00002.safetensors", "model.safetensors.index.json"):
            (folder / name).chmod(0)
            message = said_to_nobody(lambda: merge_qkv(folder, free / "merged"))
            assert message.startswith(f"CheckpointError: {folder / name} cannot be read: user "), message
            (folder / name).chmod(0o644)
        assert not (free / "merged").exists()
        (folder / "sub").mkdir(mode=0)
        message = said_to_nobody(lambda: merge_qkv(folder, free / "merged"))
        assert message.startswith(f"CheckpointError: {folder / 'sub'} cannot be read: user ")
        (folder / "sub").rmdir()
        assert said_to_nobody(lambda: merge_qkv(folder, free / "merged")) == "no error"


# ---- memory and progress ---------------------------------------------------------------------------------------------
def merge_into(folder: Path, output: Path, run: int) -> None:
    merge_qkv(folder, output.with_name(f"{output.name}-{run}"), tp_size=2)


def test_nothing_but_a_buffer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own allocations at their peak, which do not grow with the model."""
    monkeypatch.setattr(byte_ranges, "CHUNK", 2**12)
    peaks = []
    for number, vocabulary in enumerate((2_000, 20_000)):
        config = config_of(28, 4, layers=1)
        config.vocab_size = vocabulary
        folder = write_folder(tmp_path / f"ordinary-{number}", config, weights_of(config))
        peaks.append(least_peak(partial(merge_into, folder, tmp_path / f"merged-{number}")))
    assert abs(peaks[1] - peaks[0]) < 2**16
    assert max(peaks) < (folder / "model.safetensors").stat().st_size / 4


def test_progress_moves_on_to_its_end(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "MB", 1)
    seen: list[tuple[str, int, int]] = []
    merge_qkv(origin, tmp_path / "merged", progress=lambda *state: seen.append(state))
    done = [state[1] for state in seen]
    assert done == sorted(done)
    assert seen[-1] == ("config.json, MB", seen[0][2], seen[0][2])
    assert seen[0][0] == "model-00001-of-00002.safetensors, MB"


def test_progress_of_a_run_that_goes_on(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already counts as written and read back; what is there and damaged as neither."""
    monkeypatch.setattr(merging, "MB", 1)
    output = tmp_path / "merged"
    count = number_of_changes(lambda output: merge_qkv(origin, output), tmp_path / "whole")
    with pytest.raises(Killed), interrupted(count - 4, Killed, for_good=True):
        merge_qkv(origin, output)
    shard = output / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    seen: list[tuple[str, int, int]] = []
    merge_qkv(origin, output, progress=lambda *state: seen.append(state))
    total = 2 * sum(path.stat().st_size for path in output.iterdir())
    assert seen[-1] == ("config.json, MB", total, total)
    first = 2 * (output / "model-00001-of-00002.safetensors").stat().st_size
    assert ("model-00001-of-00002.safetensors, MB", first, total) in seen
    assert [done for label, done, _ in seen if label.startswith(shard.name)][-1] == first + 2 * shard.stat().st_size
