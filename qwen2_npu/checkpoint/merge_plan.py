"""`qwen2-npu merge-qkv`: what a merged folder, or an unmerged one, consists of. It is written by ``merging``.

Every file of weights becomes one of the same name, in which q, k and v of a layer are replaced by the merged tensor, or
the other way round. A layer whose k or v is in another file than its q is recorded, so that unmerging restores the
same files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qwen2_npu.checkpoint import merged
from qwen2_npu.checkpoint.byte_ranges import NewFile, Range, Stored, equal, read_header, tensor_file
from qwen2_npu.checkpoint.configuration import CONFIG_FILE, read_config, read_object
from qwen2_npu.checkpoint.folders import MERGING, MERGING_PART, check_readable, is_file, locked, unreadable
from qwen2_npu.checkpoint.merged import Layout, MergedSource
from qwen2_npu.checkpoint.naming import EMBEDDING, Renamed, as_stock
from qwen2_npu.checkpoint.shards import INDEX_FILE, SINGLE_FILE, weights_files
from qwen2_npu.checkpoint.sources import open_stored
from qwen2_npu.checkpoint.weights import check_source, held_shapes, stock_shapes
from qwen2_npu.compat import WEIGHTS_FIELD, named_weights
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Shard

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
           "tf_model*.h5", "flax_model*.msgpack", "*.gguf", "*.pt", "*.pth")  # fmt: skip
"""Files of weights. Those that the checkpoint does not consist of are left out."""

Spec = tuple[str, tuple[int, ...], list[Range]]
"""A tensor to be written: dtype, shape, bytes."""


@dataclass(frozen=True)
class MergePlan:
    """A folder that is to be written.

    Attributes:
        source: the folder that it is made of.
        options: those of the command: a run goes on with what an earlier one with the same began.
        shards: the files of weights.
        others: the other files, but for the last.
        last: what makes it a checkpoint: the index of the shards, and config.json at the very end.
        left_out: files and folders of ``source`` that are not copied.
        replicas: bytes that must be the same, with the tensor that they are of: one is dropped.
        read_by_rank: bytes of weights that each rank reads; empty where it is unmerged.
        inputs: the files that it is made of, with their size and time.
    """

    source: Path
    output: Path
    options: dict[str, Any]
    shards: tuple[NewFile, ...]
    others: tuple[NewFile, ...]
    last: tuple[NewFile, ...]
    left_out: tuple[str, ...]
    replicas: tuple[tuple[str, Range, Range], ...]
    read_by_rank: tuple[int, ...]
    inputs: dict[str, tuple[int, int]]

    @property
    def files(self) -> tuple[NewFile, ...]:
        """All of them, in the order that they are written in."""
        return (*self.shards, *self.others, *self.last)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def check_replicas(self) -> None:
        """Refuse a folder whose ranks hold different values of what is one tensor.

        Raises:
            CheckpointError: naming the tensor.
        """
        for name, one, other in self.replicas:
            if not equal([one], [other]):
                raise CheckpointError(
                    f"{self.source}: {name} holds a kv head several times, and the copies differ: there is no one "
                    "original to restore; merge the original checkpoint again"
                )

    def check_inputs(self) -> None:
        """Refuse a source that was changed since.

        Raises:
            CheckpointError: naming the file.
        """
        now = _stamps(self.source, self.inputs)
        changed = next((name for name, stamp in self.inputs.items() if now[name] != stamp), None)
        if changed is not None:
            raise CheckpointError(
                f"{self.source / changed} was changed meanwhile: remove {self.output} and run the command again"
            )


def plan_merge(source: str | Path, output: str | Path, *, tp_size: int = 1) -> MergePlan:
    """What merging the checkpoint in ``source`` for ``tp_size`` ranks writes to ``output``. Nothing is written yet.

    Raises:
        CheckpointError: what is wrong with ``source`` or ``output``; ``source`` is merged already.
        UnsupportedError: a number of ranks that the model cannot be cut for.
    """
    folder = _folders(source, output)
    layout = Layout(tp_size)
    with locked(folder, shared=True):
        config = read_config(folder)
        layout.check(config)
        files = _plain(folder, weights_files(folder, config=config))
        stored = _opened(folder, config, files)
        if (name := next(filter(merged.is_merged, stored.shapes()), None)) is not None:
            raise _already_merged(folder, name)
        check_source(stored)
        headers = {file: read_header(folder / file) for file in files}

    blocks = layout.blocks(config)
    found = {name: each for _, tensors in headers.values() for name, each in tensors.items()}
    file_of = {name: file for file, (_, tensors) in headers.items() for name in tensors}
    new: dict[str, dict[str, Spec]] = {file: {} for file in files}
    moved: dict[str, str] = {}
    for name, each in found.items():
        whole = merged.merged_name(name)
        if whole is None:
            new[file_of[name]][name] = (each.dtype, each.shape, [each.bytes])
        elif name == merged.stock_names(whole)["q_proj"]:
            parts = {part: found[stock] for part, stock in merged.stock_names(whole).items()}
            if len({part.dtype for part in parts.values()}) > 1:
                raise CheckpointError(
                    f"{folder}: {name} is stored as {each.dtype}, and k or v of its layer in another dtype: one tensor "
                    "has one dtype; convert the checkpoint to one, e.g. with save_pretrained"
                )
            ranges = [parts[block.part].rows(block.start, block.stop) for block in blocks]
            rows = sum(block.stop - block.start for block in blocks)
            new[file_of[name]][whole] = (each.dtype, (rows, *each.shape[1:]), ranges)
            moved |= {
                stock: file_of[stock] for stock in merged.stock_names(whole).values() if file_of[stock] != file_of[name]
            }
    text = _read_text(folder / CONFIG_FILE)
    names = stored.names if isinstance(stored, Renamed) else {}
    by_stock_name = {names.get(name, name): each for name, each in found.items()}
    return _plan(
        folder, output, {"merge": tp_size}, headers, new,
        config_text=with_record(text, Layout(tp_size, moved=moved)),
        read_by_rank=tuple(_read_by(Shard(rank, tp_size), stored.config, by_stock_name) for rank in range(tp_size)),
    )  # fmt: skip


def plan_unmerge(
    source: str | Path, output: str | Path, *, assume_tp: int | None = None, tp_size: int | None = None
) -> MergePlan:
    """What restoring the ordinary checkpoint of the merged one in ``source`` writes. Nothing is written yet.

    Args:
        assume_tp: for how many ranks it was merged, where it does not record that.
        tp_size: for how many it is expected to be; None for any number.

    Raises:
        CheckpointError: what is wrong with ``source`` or ``output``; ``source`` is not merged.
        UnsupportedError: a number of ranks that contradicts it.
    """
    folder = _folders(source, output)
    with locked(folder, shared=True):
        config = read_config(folder)
        files = _plain(folder, weights_files(folder, config=config))
        stored = merged.present(_opened(folder, config, files), folder, assume_tp=assume_tp)
        if not isinstance(stored, MergedSource):
            raise CheckpointError(f"{folder} has no merged q, k and v: it is an ordinary checkpoint, loaded as it is")
        check_source(stored)
        headers = {file: read_header(folder / file) for file in files}
    layout, blocks = stored.layout, stored.blocks
    if tp_size not in (None, layout.tp_size):
        raise UnsupportedError(
            f"tp_size={tp_size}: {folder} is merged for tp_size={layout.tp_size}; leave it out when unmerging"
        )

    new: dict[str, dict[str, Spec]] = {file: {} for file in (*files, *layout.moved.values())}
    replicas: list[tuple[str, Range, Range]] = []
    for file, (_, tensors) in headers.items():
        for name, each in tensors.items():
            if not merged.is_merged(name):
                new[file][name] = (each.dtype, each.shape, [each.bytes])
                continue
            for part, stock in merged.stock_names(name).items():
                shape = stored.shapes()[stock]
                ranges = [each.rows(*span) for span in merged.spans(blocks, part, 0, shape[0])]
                new[layout.moved.get(stock, file)][stock] = (each.dtype, shape, ranges)
            replicas += [(name, *pair) for pair in _replicas(each, blocks)]
    options = {"unmerge": assume_tp or "recorded"}
    text = without_record(_read_text(folder / CONFIG_FILE))
    return _plan(folder, output, options, headers, new, config_text=text, replicas=tuple(replicas))


def _replicas(tensor: Stored, blocks: Sequence[merged.Block]) -> list[tuple[Range, Range]]:
    first: dict[tuple[str, int], merged.Block] = {}
    found = []
    for block in blocks:
        kept = first.setdefault((block.part, block.start), block)
        if kept is not block:
            size = block.stop - block.start
            found.append((tensor.rows(kept.at, kept.at + size), tensor.rows(block.at, block.at + size)))
    return found


def _plan(
    folder: Path,
    output: str | Path,
    options: dict[str, Any],
    headers: dict[str, tuple[dict[str, str], dict[str, Stored]]],
    new: dict[str, dict[str, Spec]],
    *,
    config_text: str,
    replicas: tuple[tuple[str, Range, Range], ...] = (),
    read_by_rank: tuple[int, ...] = (),
) -> MergePlan:
    default = next(iter(headers.values()))[0]
    shards = tuple(
        tensor_file(file, headers[file][0] if file in headers else default, tensors)
        for file, tensors in sorted(new.items())
        if tensors  # one that held k or v of another file's layer, and nothing else, is not needed
    )
    others, left_out = _others(folder, {*headers, CONFIG_FILE, INDEX_FILE, MERGING, MERGING_PART})
    last = [NewFile(CONFIG_FILE, head=config_text.encode())]
    indexed = list(headers) != [SINGLE_FILE]
    if indexed:
        before = sum(each.bytes.size for _, tensors in headers.values() for each in tensors.values())
        last.insert(0, NewFile(INDEX_FILE, head=_index(folder / INDEX_FILE, new, before).encode()))
    inputs = [*headers, CONFIG_FILE, *([INDEX_FILE] if indexed else []), *(file.name for file in others)]
    return MergePlan(
        folder, Path(output).expanduser(), options, shards, others, tuple(last), left_out, replicas, read_by_rank,
        _stamps(folder, inputs),
    )  # fmt: skip


# ---- config.json and the index ---------------------------------------------------------------------------------------
def with_record(text: str, layout: Layout) -> str:
    """config.json with the record of ``layout`` as its first field, and otherwise as it is."""
    text = without_record(text)
    begin = text.index("{") + 1
    return text[:begin] + _field(layout.record()) + text[begin:]


def without_record(text: str) -> str:
    """config.json without a record: byte for byte what it was before, unless it was written anew since."""
    values = json.loads(text)
    if merged.RECORD not in values:
        return text
    begin = text.index("{") + 1
    field = _field(values.pop(merged.RECORD))
    if text[begin:].startswith(field):
        return text[:begin] + text[begin + len(field) :]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _field(record: Any) -> str:
    return f'\n  "{merged.RECORD}": {json.dumps(record)},'


def _index(path: Path, new: dict[str, dict[str, Spec]], before: int) -> str:
    """The index of the new shards, as transformers writes it."""
    index = read_object(path)
    after = sum(part.size for tensors in new.values() for _, _, ranges in tensors.values() for part in ranges)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(total := metadata.get("total_size"), (int, float)):
        index["metadata"] = metadata | {"total_size": total + after - before}
    index["weight_map"] = {name: file for file, tensors in new.items() for name in tensors}
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise unreadable(path, error) from error


# ---- files -----------------------------------------------------------------------------------------------------------
def _folders(source: str | Path, output: str | Path) -> Path:
    """``source``, where it and ``output`` are apart.

    Raises:
        CheckpointError: one is in the other.
    """
    folder = Path(source).expanduser()
    inside, outside = Path(output).expanduser().resolve(), folder.resolve()
    if inside == outside or outside in inside.parents:
        where = "the folder that is read" if inside == outside else f"inside {folder}, which is read"
        raise CheckpointError(f"output path {str(output)!r} is {where}: name a folder outside of it")
    return folder


def _plain(folder: Path, files: list[str]) -> list[str]:
    """``files``, where they are safetensors, and in ``folder`` itself.

    Raises:
        CheckpointError: one is not.
    """
    for file in files:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{folder}: {INDEX_FILE} names {file!r}, and files of the folder itself are read, safetensors only: "
                "write the checkpoint anew with save_pretrained"
            )
    return files


def _opened(folder: Path, config: Any, files: list[str]) -> Any:
    """The tensors of ``files``, which are to have the usual names, as are the files.

    Raises:
        CheckpointError: they have others.
    """
    way_out = "write the checkpoint anew with save_pretrained"
    if (file := named_weights(config)) is not None:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} says that its weights are {WEIGHTS_FIELD}={file!r}: {way_out}")
    source = as_stock(open_stored(folder, config, files))
    names = source.names if isinstance(source, Renamed) else {}
    if (other := next((name for name in names if names[name] not in (name, EMBEDDING)), None)) is not None:
        raise CheckpointError(f"{folder}: {other} is what the model has as {names[other]}: {way_out}")
    return source


def _others(folder: Path, known: set[str]) -> tuple[tuple[NewFile, ...], tuple[str, ...]]:
    """Files to be copied as they are, also those in subfolders; and the names of what is not copied."""
    copied: list[NewFile] = []
    left_out: list[str] = []

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    for above, folders, names in os.walk(folder, onerror=fail):
        here = Path(above)
        skipped = [name for name in folders if name.startswith(".") or (here / name).is_symlink()]
        left_out += [f"{(here / name).relative_to(folder)}/" for name in skipped]
        folders[:] = sorted(set(folders) - set(skipped))
        for name in sorted(names):
            path = here / name
            relative = str(path.relative_to(folder))
            if relative in known:
                continue
            if path.is_symlink() and not path.exists():
                raise CheckpointError(f"{path} is a link to a file that is missing; fetch it again, or remove the link")
            if not is_file(path) or any(fnmatch(name, pattern) for pattern in WEIGHTS):
                left_out.append(relative)
                continue
            check_readable(path)
            copied.append(NewFile(relative, (Range(path, 0, path.stat().st_size),)))
    return tuple(copied), tuple(left_out)


def _stamps(folder: Path, names: Sequence[str] | dict[str, Any]) -> dict[str, tuple[int, int]]:
    found = {}
    for name in names:
        try:
            stat = (folder / name).stat()
        except OSError as error:
            raise unreadable(folder / name, error) from error
        found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def _read_by(shard: Shard, config: Any, stored: dict[str, Stored]) -> int:
    """Bytes of weights that one rank reads."""
    shapes = stock_shapes(config)
    return sum(
        stored[name].bytes.size * math.prod(held) // math.prod(shapes[name])
        for name, held in held_shapes(config, shard).items()
    )


def _already_merged(folder: Path, name: str) -> CheckpointError:
    layout = merged.read_record(folder)
    said = "its config.json does not record for how many ranks" if layout is None else f"for tp_size={layout.tp_size}"
    assumed = ("--assume-tp", "N") if layout is None else ()
    unmerge = merged.command(folder, "--unmerge", *assumed, output=f"{folder}-unmerged")
    return CheckpointError(
        f"{folder} is merged already ({name}; {said}): load it as it is, or restore the original first: `{unmerge}`"
    )
