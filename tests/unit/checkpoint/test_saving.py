"""A save that is killed or fails at any point: the folder then holds the old checkpoint, the new one, or is refused."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import shutil
import signal
import stat
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import saving, weights
from qwen2_npu.checkpoint.shards import INDEX_FILE
from qwen2_npu.errors import CheckpointError
from tests.unit.checkpoint.merges import open_below
from tests.unit.small import small_config, small_stock, stock_weights

LAYOUTS = {"single": "1GB", "several": "40KB", "many": "20KB"}
"""Names of layouts -> max_shard_size of the model below."""

CHANGES = ("replace", "rename", "unlink", "remove", "link", "symlink", "mkdir", "rmdir")
"""Functions of ``os`` that change a folder."""

REALLY_UNLINK = os.unlink


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves: synchronising each of their files may take long where others use the disk, too."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Killed(BaseException):
    """In place of SIGKILL: from here on no change succeeds, whatever is tried to clean up."""


@contextmanager
def interrupted(at: int, error: Callable[[], BaseException], *, for_good: bool) -> Iterator[list[str]]:
    """The change number ``at`` fails and, with ``for_good``, all after it. Yields the changes so far."""
    done: list[str] = []

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == at or (for_good and len(done) > at):
                raise error()
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        patch.setattr(weights, "save_file", guarded("save_file", weights.save_file))
        yield done


class Child:
    """A forked process. ``status``: its exit status once it has ended, or minus the signal that ended it."""

    status: int | None = None


@contextmanager
def child() -> Iterator[Any]:
    """Fork: the body runs in both. None in the child, which ends with it; a :class:`Child` here, which waits for it."""
    process, pid = Child(), os.fork()
    if pid == 0:
        status = 1
        try:
            yield None
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield process
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # it may be waiting for what does not come any more
        raise
    finally:
        process.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def model(seed: int, **changes: Any) -> Qwen2ForCausalLM:
    config = small_config(num_hidden_layers=1, hidden_size=64, intermediate_size=32, vocab_size=61, **changes)
    made = Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config, seed=seed)))
    made.generation_config.max_length = 100 + seed
    return made


OLD, NEW, NEW_CONFIG = model(1), model(2), model(2, rms_norm_eps=1e-3)
NEW.generation_config.max_length = OLD.generation_config.max_length


def same_weights(weights: dict[str, torch.Tensor], saved: Qwen2ForCausalLM) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in saved.stock_state_dict().items())


def loaded(folder: Path, new: Qwen2ForCausalLM) -> str:
    """``old`` or ``new`` where this project and transformers load it completely; else why it is refused."""
    try:
        ours = Qwen2ForCausalLM.from_pretrained(folder)
    except CheckpointError as error:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
        return str(error)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    found = [
        name
        for name, saved in (("old", OLD), ("new", new))
        if same_weights(ours.stock_state_dict(), saved)
        and same_weights(stock.state_dict(), saved)
        and ours.config.rms_norm_eps == stock.config.rms_norm_eps == saved.config.rms_norm_eps
        and ours.generation_config.max_length == saved.generation_config.max_length
    ]
    return found[0] if found else "a mixture"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def seen(folder: Path) -> frozenset[tuple[str, bytes]]:
    """All that a reader may look at: what is in ``.saving-…`` only where an index names it."""
    files = content(folder)
    aside = b".saving-" in files.get(INDEX_FILE, b"")
    return frozenset(item for item in files.items() if aside or not item[0].startswith("."))


def restored(folder: Path, origin: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(origin, folder, symlinks=True))


# ---- kills ----------------------------------------------------------------------------------------------------------
PAIRS = [
    ("several", "several"),
    ("single", "several"),
    ("several", "single"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (("single", "single"), ("several", "many"), ("many", "several"))
    ),
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_killed_at_any_point(tmp_path, before, after):
    """The old checkpoint, then the new one. The next save cleans up."""
    assert kill_everywhere(tmp_path, before, after, NEW) == ["old", "new"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(*PAIRS[0], marks=(pytest.mark.slow, pytest.mark.slow_in_ci)), *PAIRS[1:]]
)
def test_killed_at_any_point_while_the_configuration_changes(tmp_path, before, after):
    """The old checkpoint, then none that could be loaded with the wrong configuration, then the new one."""
    assert kill_everywhere(tmp_path, before, after, NEW_CONFIG) == ["old", INTERRUPTED, "new"]


def test_killed_where_files_have_one_name_only(tmp_path, monkeypatch):
    """A file system without hard links."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert kill_everywhere(tmp_path, "several", "several", NEW) == ["old", "new"]


def test_killed_over_a_checkpoint_with_a_shard_missing(tmp_path):
    """New shards get the names that the old index gives: it must not become usable by that."""

    def spoil(folder: Path) -> None:
        sorted(folder.glob("model-*"))[1].unlink()

    order = kill_everywhere(tmp_path, "several", "several", NEW, spoil)
    assert order[-1] == "new"
    assert not {"old", "a mixture"}.intersection(order)


INTERRUPTED = "has no config.json: a save into it was interrupted"


def kill_everywhere(
    tmp_path: Path, before: str, after: str, new: Qwen2ForCausalLM, spoil: Callable[[Path], None] = lambda folder: None
) -> list[str]:
    """What the folder is as the kill comes later and later, repetitions left out."""
    origin, folder, fresh = tmp_path / "origin", tmp_path / "folder", tmp_path / "fresh"
    OLD.save_pretrained(origin, max_shard_size=LAYOUTS[before])
    new.save_pretrained(fresh, max_shard_size=LAYOUTS[after])
    intact = loaded(origin, new)
    assert intact == "old"
    spoil(origin)
    outcomes: dict[frozenset[tuple[str, bytes]], str] = {}
    for at in range(1, 100):
        restored(folder, origin)
        with interrupted(at, Killed, for_good=True) as done, suppress(Killed, CheckpointError):
            new.save_pretrained(folder, max_shard_size=LAYOUTS[after])
        if (state := seen(folder)) not in outcomes:
            outcome = loaded(folder, new)
            outcomes[state] = INTERRUPTED if INTERRUPTED in outcome else outcome
            assert outcome != "a mixture", f"killed before change {at}, {done[at - 1]}"
            new.save_pretrained(folder, max_shard_size=LAYOUTS[after])
            assert content(folder) == content(fresh), f"killed before change {at}, {done[at - 1]}, then saved again"
        if len(done) < at:
            return [name for name, _ in groupby(outcomes.values())]
    raise AssertionError("there is no end to the changes")


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_process_that_is_really_killed(tmp_path, at):
    OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    calls = iter(range(1, at + 1))

    def replace(*args: Any, really: Callable[..., None] = os.replace, **kwargs: Any) -> None:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        really(*args, **kwargs)

    with child() as process:
        if process is None:
            os.replace = replace
            NEW.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    assert process.status == -signal.SIGKILL
    assert list(tmp_path.glob(".saving-*"))
    assert loaded(tmp_path, NEW) == "old"
    NEW.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    assert not list(tmp_path.glob(".*"))
    assert loaded(tmp_path, NEW) == "new"


@pytest.mark.parametrize("linked", [True, False], ids=["", "without hard links"])
@pytest.mark.parametrize("after", ["several", "many", "single"])
def test_nothing_is_moved_in_that_a_power_cut_could_take(tmp_path, monkeypatch, after, linked):
    """Every file is synchronised before it is moved, and the folder before the next step, and before old files go."""
    OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    synced: dict[Path, int] = {}  # what was, and when
    names: dict[Path, int] = {}  # second names of files, and when they were given
    times = count()
    moved: list[Path] = []
    pending: tuple[object, ...] = ()  # the last step, while a power cut could take it

    def fsync(handle: int, really: Callable[[int], None] = os.fsync) -> None:
        nonlocal pending
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path] = next(times)
        pending = () if path == tmp_path else pending
        really(handle)

    def link(source: Path, target: Path, really: Callable[..., None] = os.link) -> None:
        if not linked:
            raise OSError(errno.EPERM, "Operation not permitted")
        really(source, target)
        names[Path(target)] = next(times)

    def replace(source: Path, target: Path, really: Callable[..., None] = os.replace) -> None:
        nonlocal pending
        alone = target.name in (INDEX_FILE, "model.safetensors", "config.json")
        same = () if alone else ("replace", source.parent)
        assert pending in ((), same), f"{target} is moved in before {pending} is for good"
        assert source in synced, f"{source} was not synchronised"
        assert synced[source.parent] > synced[source], f"the name of {source} was not synchronised"
        if target.name == INDEX_FILE:
            for file in set(json.loads(source.read_text())["weight_map"].values()):
                if "/" in file:
                    aside = tmp_path / file
                    assert synced[aside.parent] > (names if linked else synced)[aside], f"{aside} is not there for good"
        moved.append(target)
        pending = ("replace", source.parent)
        really(source, target)

    def unlink(path: Path, really: Callable[[Path], None] = os.unlink) -> None:
        nonlocal pending
        assert pending in ((), ("unlink",)), f"{path} goes before {pending} is for good"
        pending = ("unlink",)
        really(path)

    def rmtree(path: Path, really: Callable[[Path], None] = shutil.rmtree) -> None:
        assert pending == ()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", REALLY_UNLINK)
            really(path)

    for module, function in ((os, fsync), (os, link), (os, replace), (os, unlink), (shutil, rmtree)):
        monkeypatch.setattr(module, function.__name__, function)
    NEW_CONFIG.save_pretrained(tmp_path, max_shard_size=LAYOUTS[after])
    assert {path.name for path in moved} == set(content(tmp_path))
    assert (len(names) > 0) == linked


def test_a_new_folder_is_there_after_a_power_cut(tmp_path, monkeypatch):
    synced: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.readlink(f"/proc/self/fd/{handle}")))
    NEW.save_pretrained(tmp_path / "new")
    assert {str(tmp_path), str(tmp_path / "new")} <= synced


# ---- failures -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.slow_in_ci
@pytest.mark.parametrize(("before", "after"), PAIRS[:3])
def test_failed_at_any_point(tmp_path, before, after):
    """All is as it was, as the error says. (Only what is left over may fail to be removed without a word.)"""
    origin, folder = tmp_path / "origin", tmp_path / "folder"
    OLD.save_pretrained(origin, max_shard_size=LAYOUTS[before])
    for at in range(1, 100):
        restored(folder, origin)
        with interrupted(at, lambda: OSError(errno.EROFS, "Read-only file system"), for_good=False) as done:
            try:
                NEW_CONFIG.save_pretrained(folder, max_shard_size=LAYOUTS[after])
            except CheckpointError as error:
                message = str(error)
                assert "Read-only file system; what was there is unchanged. Allow writing there, or choose" in message
                assert content(folder) == content(origin), f"failed at change {at}, {done[at - 1]}"
                continue
        assert loaded(folder, NEW_CONFIG) == "new"
        if len(done) < at:
            assert not list(folder.glob(".*"))
            return
    raise AssertionError("there is no end to the changes")


def test_failed_where_there_was_no_folder(tmp_path):
    for at in range(2, 100):
        with interrupted(at, lambda: OSError(errno.ENOSPC, "No space left on device"), for_good=False) as done:
            try:
                NEW.save_pretrained(tmp_path / "folder")
            except CheckpointError:
                assert not (tmp_path / "folder").exists(), f"failed at change {at}, {done[at - 1]}"
                continue
        assert loaded(tmp_path / "folder", NEW) == "new"
        return


def test_one_failure_that_cannot_be_undone_says_where_everything_is(tmp_path):
    folder = tmp_path / "folder"
    OLD.save_pretrained(folder)
    before = set(content(folder).values())
    with interrupted(10**6, OSError, for_good=False) as every:
        NEW_CONFIG.save_pretrained(folder)
    OLD.save_pretrained(folder)
    said = "Input/output error, and then what was there could not be restored: .* Its files are in "
    at = max(number for number, name in enumerate(every, 1) if name in ("rename", "replace"))
    with (
        interrupted(at, lambda: OSError(errno.EIO, "Input/output error"), for_good=True),
        pytest.raises(CheckpointError, match=said) as caught,
    ):
        NEW_CONFIG.save_pretrained(folder)
    aside = Path(str(caught.value).rpartition("Its files are in ")[2])
    assert before <= {path.read_bytes() for path in aside.iterdir()} | set(content(folder).values())


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_failed_and_not_restored(tmp_path):
    """What cannot be undone is not called unchanged, and what was there can be found."""
    origin, folder = tmp_path / "origin", tmp_path / "folder"
    OLD.save_pretrained(origin, max_shard_size=LAYOUTS["several"])
    kinds: list[str] = []
    outcomes: dict[frozenset[tuple[str, bytes]], str] = {}
    for at in range(1, 100):
        restored(folder, origin)
        message = ""
        with interrupted(at, lambda: OSError(errno.EIO, "Input/output error"), for_good=True) as done:
            try:
                NEW_CONFIG.save_pretrained(folder, max_shard_size=LAYOUTS["several"])
            except CheckpointError as error:
                message = str(error)
        if (state := seen(folder)) not in outcomes:
            outcomes[state] = loaded(folder, NEW_CONFIG)
        outcome = outcomes[state]
        if not message:
            kinds.append("saved")
            assert outcome == "new"
        elif message.endswith("what was there is unchanged. Allow writing there, or choose another folder"):
            kinds.append("unchanged")
            assert outcome == "old"
        else:
            kinds.append("not restored")
            assert outcome != "a mixture"
            aside = message.rpartition("could not be restored: [Errno 5] Input/output error. Its files are in ")[2]
            kept = {path.read_bytes() for path in Path(aside).iterdir()}
            assert set(content(origin).values()) <= kept | set(content(folder).values())
        if len(done) < at:
            assert [name for name, _ in groupby(kinds)] == ["unchanged", "not restored", "saved"]
            return
    raise AssertionError("there is no end to the changes")


# ---- others at the same time ----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_two_that_save_and_one_that_reads(tmp_path):
    """Whoever loads gets one checkpoint of one process; so does who comes after them."""
    folder = tmp_path / "folder"
    OLD.save_pretrained(folder, max_shard_size=LAYOUTS["several"])
    with child() as first, child() if first is not None else nullcontext() as second:
        for saved, process in ((OLD, first), (NEW_CONFIG, second)):
            if process is None:
                for _ in range(12):
                    saved.save_pretrained(folder, max_shard_size=LAYOUTS["several"])
                break
        else:
            seen_by_reader = set()
            for _ in range(60):
                ours = Qwen2ForCausalLM.from_pretrained(folder)
                weights = ours.stock_state_dict()
                seen_by_reader.add((ours.config.rms_norm_eps, same_weights(weights, OLD), same_weights(weights, NEW)))
            assert seen_by_reader <= {(1e-6, True, False), (1e-3, False, True)}
    assert (first.status, second.status) == (0, 0)
    assert loaded(folder, NEW_CONFIG) in ("old", "new")
    assert not list(folder.glob(".*"))


def test_what_another_process_is_writing_is_left_alone(tmp_path, monkeypatch):
    """One that was killed is cleaned up after; one that is still at work finishes, and is the last to save then."""
    OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    (tmp_path / ".saving-dead" / "new").mkdir(parents=True)
    (hers, theirs), (ours, yours) = os.pipe(), os.pipe()
    write = weights.save_file

    def slowly(*args: Any, **kwargs: Any) -> None:
        os.write(theirs, b"!")
        os.read(ours, 1)
        write(*args, **kwargs)

    with child() as process:
        if process is None:
            monkeypatch.setattr(weights, "save_file", slowly)
            NEW.save_pretrained(tmp_path)
        else:
            os.read(hers, 1)
            OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["many"])
            assert len(list(tmp_path.glob(".saving-*"))) == 1
            os.write(yours, b"!")
    assert process.status == 0
    assert loaded(tmp_path, NEW) == "new"
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_save_left_goes_before_the_disk_is_needed(tmp_path):
    """A disk may have room for one checkpoint beside the one there is."""
    (tmp_path / ".saving-dead" / "new").mkdir(parents=True)
    beside: list[list[Path]] = []

    def write(new: Path) -> None:
        beside.append([path for path in tmp_path.iterdir() if path != new.parent])

    saving.replace_checkpoint(tmp_path, write)
    assert beside == [[]]


def test_no_file_stays_open(tmp_path):
    (tmp_path / ".saving-dead").mkdir()
    OLD.save_pretrained(tmp_path)
    NEW.save_pretrained(tmp_path)
    gc.collect()
    assert not open_below(tmp_path)


def test_leftovers_where_folders_have_no_locks(tmp_path, monkeypatch):
    """A network file system: what has a lock is judged by that, what has none may belong to someone."""
    flock = fcntl.flock

    def files_only(handle: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", files_only)
    for name in ("dead", "new"):
        (tmp_path / f".saving-{name}").mkdir()
    (tmp_path / ".saving-dead" / saving.LOCK_FILE).touch()
    NEW.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".saving-new"]
    monkeypatch.setattr(fcntl, "flock", flock)
    NEW.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".*"))


# ---- what the folder is like afterwards -----------------------------------------------------------------------------
def test_saving_again_changes_no_byte(tmp_path):
    OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    before = content(tmp_path)
    shards = {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    assert set(before) == {"config.json", "generation_config.json", INDEX_FILE} | shards
    OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    assert content(tmp_path) == before


@pytest.mark.parametrize("umask", [0o022, 0o007], ids=oct)
def test_who_may_read_it_is_up_to_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        OLD.save_pretrained(tmp_path, max_shard_size=LAYOUTS["several"])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


OTHERS = (
    "README.md", "tokenizer.json", "model.py", "sub/model.safetensors", "sub/model-00001-of-00002.safetensors",
    "model.fp16.safetensors", "model_ema.safetensors", "model-best.safetensors", "model.safetensors.bak",
    "model-00001-of-00002.fp16.safetensors", "model_ema-00001-of-00002.safetensors", "model-1-of-2.safetensors",
    "model.safetensors.index.fp16.json", "model_ema.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "adapter_model.safetensors", "optimizer.pt",
)  # fmt: skip


@pytest.mark.parametrize("after", ["single", "several", "many"])
@pytest.mark.parametrize("before", ["single", "several"])
def test_files_of_others_stay(tmp_path, before, after):
    """Nothing goes but the weights that are replaced: transformers removes more, whatever is numbered like a shard."""
    OLD.save_pretrained(tmp_path / "folder", max_shard_size=LAYOUTS[before])
    NEW.save_pretrained(tmp_path / "fresh", max_shard_size=LAYOUTS[after])
    (tmp_path / "folder" / "sub").mkdir()
    others = {name: name.encode() for name in OTHERS}
    for name, text in others.items():
        (tmp_path / "folder" / name).write_bytes(text)
    NEW.save_pretrained(tmp_path / "folder", max_shard_size=LAYOUTS[after])
    assert content(tmp_path / "folder") == content(tmp_path / "fresh") | others


def test_files_that_an_index_named_and_no_save_wrote_stay(tmp_path):
    """Their names are not those of shards: whoever gave them knows more about them than their index."""
    OLD.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model_ema.safetensors")
    weight_map = dict.fromkeys(OLD.stock_state_dict(), "model_ema.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    before = (tmp_path / "model_ema.safetensors").read_bytes()
    assert loaded(tmp_path, NEW) == "old"
    NEW.save_pretrained(tmp_path)
    assert loaded(tmp_path, NEW) == "new"
    assert (tmp_path / "model_ema.safetensors").read_bytes() == before


@pytest.mark.parametrize("fails", [False, True], ids=["saved", "failed"])
def test_links_to_files_elsewhere(tmp_path, fails, monkeypatch):
    """A folder of the Hugging Face cache: its files are links, and what they lead to belongs to others, too."""
    blobs, folder = tmp_path / "blobs", tmp_path / "folder"
    OLD.save_pretrained(blobs, max_shard_size=LAYOUTS["several"])
    before = content(blobs)
    folder.mkdir()
    for name in before:
        (folder / name).symlink_to(f"../blobs/{name}")
    order = []

    def sync(path: Path, really: Callable[[Path], None] = saving._sync) -> None:
        really(path)
        if path == folder:
            order.append(same_weights(AutoModelForCausalLM.from_pretrained(folder).state_dict(), OLD))
            if fails and not order[-1]:
                raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "_sync", sync)
    with pytest.raises(CheckpointError, match="unchanged") if fails else nullcontext():
        NEW.save_pretrained(folder, max_shard_size=LAYOUTS["several"])
    assert [old for old, _ in groupby(order)] == [True, False]
    assert content(blobs) == before
    links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    assert links == {name: f"../blobs/{name}" for name in before if fails or "config" in name}


@pytest.mark.parametrize("weight_map", [{"a": 1}, {"a": "file", "b": 1}, ["a"], "a", None])
def test_an_index_without_a_map_of_texts_names_no_file(tmp_path, weight_map):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert saving._weight_map(tmp_path) == {}


def test_an_index_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    assert saving._weight_map(tmp_path) == {}
    for text in ("{", "[]"):
        (tmp_path / INDEX_FILE).write_text(text)
        assert saving._weight_map(tmp_path) == {}
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / INDEX_FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        saving._weight_map(tmp_path)


def test_what_the_index_names_is_not_removed(tmp_path):
    """Wherever it names it; another folder whose name begins alike is."""
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": ".saving-12/old/model-00002-of-00002.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    for name in (".saving-12", ".saving-1"):
        (tmp_path / name).mkdir()
        saving._remove(tmp_path / name)
    assert [path.name for path in tmp_path.glob(".*")] == [".saving-12"]
