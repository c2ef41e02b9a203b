"""What a folder consists of that a command makes of a checkpoint folder: `merging` writes it.

Every file of weights becomes one of the same name, with other tensors; what stands beside is copied.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qwen2_npu.checkpoint import merged
from qwen2_npu.checkpoint.byte_ranges import ByteSource, NewFile, Range, Stored, equal, read_header, tensor_file
from qwen2_npu.checkpoint.configuration import CONFIG_FILE, read_object
from qwen2_npu.checkpoint.folders import (
    MERGING,
    MERGING_PART,
    QUANTISING,
    QUANTISING_PART,
    check_readable,
    is_file,
    unreadable,
)
from qwen2_npu.checkpoint.naming import EMBEDDING, Renamed, as_stock
from qwen2_npu.checkpoint.shards import INDEX_FILE, SINGLE_FILE, weights_files
from qwen2_npu.checkpoint.sources import open_stored
from qwen2_npu.checkpoint.weights import check_source
from qwen2_npu.compat import WEIGHTS_FIELD, named_weights
from qwen2_npu.errors import CheckpointError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
           "tf_model*.h5", "flax_model*.msgpack", "*.gguf", "*.pt", "*.pth")  # fmt: skip
"""Files of weights. Those that the checkpoint does not consist of are left out."""

MARKS = (MERGING, MERGING_PART, QUANTISING, QUANTISING_PART)
"""Files of a run that was interrupted: not copied."""

Spec = tuple[str, tuple[int, ...], Sequence[ByteSource]]
"""A tensor to be written: dtype, shape, bytes."""


@dataclass(frozen=True)
class FolderPlan:
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
        mark: the file that says, while it is written, whose it is.
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
    mark: str = MERGING

    @property
    def files(self) -> tuple[NewFile, ...]:
        """All of them, in the order that they are written in."""
        return (*self.shards, *self.others, *self.last)

    @property
    def part(self) -> str:
        """The name of a file that is being written."""
        return Path(self.mark).with_suffix(".part").name

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


def plan_of(
    folder: Path,
    output: str | Path,
    options: dict[str, Any],
    headers: dict[str, tuple[dict[str, str], dict[str, Stored]]],
    new: dict[str, dict[str, Spec]],
    *,
    config_text: str,
    replicas: tuple[tuple[str, Range, Range], ...] = (),
    read_by_rank: tuple[int, ...] = (),
    mark: str = MERGING,
) -> FolderPlan:
    """A folder like the one in ``folder``, with other weights.

    Args:
        headers: of its files of weights: metadata and tensors.
        new: the tensors of every new file.
        config_text: the new config.json.
    """
    default = next(iter(headers.values()))[0]
    shards = tuple(
        tensor_file(file, headers[file][0] if file in headers else default, tensors)
        for file, tensors in sorted(new.items())
        if tensors  # one that held k or v of another file's layer, and nothing else, is not needed
    )
    others, left_out = _others(folder, {*headers, CONFIG_FILE, INDEX_FILE, *MARKS})
    last = [NewFile(CONFIG_FILE, head=config_text.encode())]
    indexed = list(headers) != [SINGLE_FILE]
    if indexed:
        before = sum(each.bytes.size for _, tensors in headers.values() for each in tensors.values())
        last.insert(0, NewFile(INDEX_FILE, head=_index(folder / INDEX_FILE, new, before).encode()))
    inputs = [*headers, CONFIG_FILE, *([INDEX_FILE] if indexed else []), *(file.name for file in others)]
    return FolderPlan(
        folder, Path(output).expanduser(), options, shards, others, tuple(last), left_out, replicas, read_by_rank,
        _stamps(folder, inputs), mark,
    )  # fmt: skip


# ---- config.json and the index ---------------------------------------------------------------------------------------
def with_first(field: str, text: str) -> str:
    """A JSON object with that field before the others."""
    begin = text.index("{") + 1
    return text[:begin] + field + text[begin:]


def _index(path: Path, new: dict[str, dict[str, Spec]], before: int) -> str:
    """The index of the new shards, as transformers writes it."""
    index = read_object(path)
    after = sum(part.size for tensors in new.values() for _, _, ranges in tensors.values() for part in ranges)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(total := metadata.get("total_size"), (int, float)):
        index["metadata"] = metadata | {"total_size": total + after - before}
    index["weight_map"] = {name: file for file, tensors in new.items() for name in tensors}
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_text(path: Path) -> str:
    """What a text file holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise unreadable(path, error) from error


# ---- files -----------------------------------------------------------------------------------------------------------
def separate(source: str | Path, output: str | Path) -> Path:
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


def plain(folder: Path, files: list[str]) -> list[str]:
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


def opened(folder: Path, config: Any, files: list[str]) -> Any:
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


def unmerged(
    folder: Path, config: Any, refusal: Callable[[Path, str], CheckpointError]
) -> tuple[Any, dict[str, tuple[dict[str, str], dict[str, Stored]]]]:
    """The tensors of an ordinary checkpoint, which fit its configuration; and per file its metadata and tensors.

    Args:
        refusal: what to raise of a folder that has a merged tensor of that name.

    Raises:
        CheckpointError: what is wrong with it.
    """
    files = plain(folder, weights_files(folder, config=config))
    stored = opened(folder, config, files)
    if (name := next(filter(merged.is_merged, stored.shapes()), None)) is not None:
        raise refusal(folder, name)
    check_source(stored)
    return stored, {file: read_header(folder / file) for file in files}


def _others(folder: Path, known: set[str]) -> tuple[tuple[NewFile, ...], tuple[str, ...]]:
    """Files to be copied as they are, also those in subfolders; and the names of what is not copied."""
    copied: list[NewFile] = []
    left_out: list[str] = []

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename), error)

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
            if not path.exists():  # and it was listed
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
