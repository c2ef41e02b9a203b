"""Files that another user may not read, and folders that another process holds."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import folders
from qwen2_npu.checkpoint.folders import locked
from qwen2_npu.checkpoint.merge_plan import plan_merge, plan_unmerge
from qwen2_npu.checkpoint.quantizing import plan_quantize
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.checkpoint.tokenizer import load_tokenizer
from qwen2_npu.conformance import tiny
from qwen2_npu.errors import CheckpointError
from tests.unit.checkpoint.merges import config_of, guide_merged, open_below, weights_of, write_folder
from tests.unit.small import V4, small_stock

NOBODY = 65534

try:
    NAME = f"user {pwd.getpwuid(NOBODY).pw_name}"
except KeyError:
    NAME = f"user {NOBODY}"

SHARD = "model-00002-of-00014.safetensors"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


# ---- other users ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards with a tokenizer. What it takes to load it is imported then."""
    path = tmp_path_factory.mktemp("origin")
    small_stock().save_pretrained(path, max_shard_size="300KB", safe_serialization=True)
    for shard in path.glob("*.safetensors"):
        shard.chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.path() / name, path)
    (path / "pytorch_model.bin").touch()
    load_everything(path)
    return path


@pytest.fixture
def folder(origin: Path) -> Iterator[Path]:
    """A copy that every user can reach and read."""
    with tempfile.TemporaryDirectory() as above:
        path = Path(shutil.copytree(origin, Path(above, "model")))
        for each in (path, path.parent):
            each.chmod(0o755)
        yield path


def load_everything(folder: Path) -> None:
    Qwen2ForCausalLM.from_pretrained(folder)
    load_tokenizer(folder)


def message_to_nobody(action: Callable[[], object]) -> str:
    """What the error says that ``action`` ends in for a user who owns nothing; its type where it is no clear one."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        message = "no error"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            action()
        except CheckpointError as error:
            message = str(error)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, message.encode())
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    return message


@as_root
def test_a_folder_that_everyone_may_read(folder):
    assert message_to_nobody(lambda: load_everything(folder)) == "no error"
    Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert message_to_nobody(lambda: load_everything(folder)) == "no error"


@as_root
def test_a_folder_that_may_not_be_listed(folder):
    """Its files can be opened. transformers 5.x lists it for the tokenizer."""
    folder.chmod(0o711)
    assert message_to_nobody(lambda: Qwen2ForCausalLM.from_pretrained(folder)) == "no error"
    assert message_to_nobody(lambda: load_tokenizer(folder)) == (
        "no error"
        if V4
        else f"{folder} cannot be read: {NAME} has no permission for {folder}; its owner can allow it with "
        f"`chmod a+r {folder}`"
    )


@as_root
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors.index.json", SHARD, "tokenizer.json",
     "tokenizer_config.json"],
)  # fmt: skip
def test_a_file_of_another_user(folder, name):
    (folder / name).chmod(0o600)
    assert message_to_nobody(lambda: load_everything(folder)) == (
        f"{folder / name} cannot be read: {NAME} has no permission for {folder / name}; its owner can allow it "
        f"with `chmod a+r {folder / name}`"
    )


@as_root
def test_a_pickled_file_of_another_user(folder):
    (folder / "pytorch_model.bin").chmod(0o600)
    message = message_to_nobody(lambda: Qwen2ForCausalLM.from_pretrained(folder, weights_file="pytorch_model.bin"))
    assert f"{NAME} has no permission for" in message
    assert "damaged" not in message


@as_root
@pytest.mark.parametrize("mode", [0o700, 0o744], ids=oct)
@pytest.mark.parametrize("above", [False, True], ids=["the_folder", "a_folder_above"])
def test_a_folder_of_another_user(folder, mode, above):
    closed = folder.parent if above else folder
    closed.chmod(mode)
    for action in (lambda: Qwen2ForCausalLM.from_pretrained(folder), lambda: load_tokenizer(folder)):
        message = message_to_nobody(action)
        assert message.startswith(str(folder))
        assert message.endswith(
            f" cannot be read: {NAME} has no permission for {closed}; its owner can allow it with `chmod a+x {closed}`"
        )


@as_root
def test_a_folder_that_may_not_be_written(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    for place, named in ((folder, ".saving-"), (folder.parent / "new", "new")):
        message = message_to_nobody(lambda place=place: model.save_pretrained(place))
        assert message.startswith(f"cannot save the checkpoint to {place}: [Errno 13] Permission denied: ")
        assert named in message
        assert message.endswith("; what was there is unchanged. Allow writing there, or choose another folder")


def test_a_disk_that_fails(tmp_path):
    error = folders.unreadable(tmp_path / "config.json", OSError(errno.EIO, os.strerror(errno.EIO)))
    assert str(error) == f"{tmp_path / 'config.json'} cannot be read: Input/output error; check the disk and its mount"


# ---- locks ----------------------------------------------------------------------------------------------------------
def test_many_read_and_one_writes(tmp_path):
    with locked(tmp_path, shared=True) as first, locked(tmp_path, shared=True) as second:
        assert first
        assert second
        handle = os.open(tmp_path, os.O_RDONLY)
        assert folders.try_lock(handle) is False
        assert folders.try_lock(handle, shared=True) is True
        os.close(handle)
    with locked(tmp_path) as alone:
        assert alone
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "read",
    [
        Qwen2ForCausalLM.from_pretrained,
        open_checkpoint,
        lambda folder: plan_merge(folder, folder.parent / "out"),
        lambda folder: plan_quantize(folder, folder.parent / "out", scheme="w8a16"),
        lambda folder: plan_unmerge(folder, folder.parent / "out", assume_tp=1),
    ],
    ids=["from_pretrained", "open_checkpoint", "plan_merge", "plan_quantize", "plan_unmerge"],
)
def test_whoever_only_reads_waits_for_no_other_reader(read, tmp_path, monkeypatch, request):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.05)
    config = config_of(4, 2)
    weights = weights_of(config)
    if "unmerge" in request.node.name:
        weights = guide_merged(config, weights, 1)
    folder = write_folder(tmp_path / "model", config, weights)
    with locked(folder, shared=True) as held:
        assert held
        read(folder)


def test_another_process_that_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.05)
    code = (
        f"import fcntl, os, sys; fcntl.flock(os.open({str(tmp_path)!r}, os.O_RDONLY), fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(CheckpointError, match=r"is held by another process.*end that process, or use another"):
            Qwen2ForCausalLM.from_pretrained(tmp_path)
        process.kill()  # the lock ends with it
    with locked(tmp_path) as alone:
        assert alone


def test_a_held_folder_is_tried_now_and_then(tmp_path, monkeypatch):
    """Whoever waits leaves the processor to whoever holds it."""
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.1)
    tries = 0

    def flock(handle: int, operation: int, really: Callable[[int, int], None] = fcntl.flock) -> None:
        nonlocal tries
        tries += 1
        really(handle, operation)

    with locked(tmp_path):
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(CheckpointError, match="is held by another process"), locked(tmp_path):
            pass
    assert 2 <= tries <= 0.1 / folders.LOCK_POLL_SECONDS + 4  # the first one, the last one, two that release it


def test_a_folder_that_is_released_is_had_at_once(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    assert folders.try_lock(handle) is True
    timer = threading.Timer(0.05, os.close, [handle])
    timer.start()
    began = time.monotonic()
    with locked(tmp_path) as alone:
        assert alone
    assert 0.04 < time.monotonic() - began < 10
    timer.join()


def test_no_folder_stays_open(tmp_path):
    """One that is refused, neither."""
    with locked(tmp_path), locked(tmp_path / "nowhere"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "LOCK_SECONDS", 0.0)
        with pytest.raises(CheckpointError, match="is held by another process"), locked(tmp_path):
            pass
    (tmp_path / "file").touch()
    folders.sync(tmp_path / "file")
    folders.sync(tmp_path)
    folders.check_readable(tmp_path / "file")
    assert not open_below(tmp_path)


def test_a_child_does_not_keep_what_its_parent_released(tmp_path):
    reading, writing = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(reading, 1)
            os._exit(0)
    with locked(tmp_path) as alone:
        assert alone
    os.write(writing, b"!")
    os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, number):
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path) as held:
        assert not held


def test_a_folder_that_is_not_there_is_not_held(tmp_path):
    with locked(tmp_path / "nowhere") as held:
        assert not held
