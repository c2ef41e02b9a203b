"""safetensors files put together from byte ranges of others: nothing but a buffer is in memory.

Rows of a tensor are adjacent in a file, so merging and unmerging q, k and v moves ranges of bytes, whatever their
dtype. What is computed of such ranges can stand in their place (:class:`ByteSource`). safetensors' own ``save_file``
takes whole files of tensors from memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qwen2_npu.checkpoint.folders import unreadable
from qwen2_npu.errors import CheckpointError

CHUNK = 8 * 2**20
"""Bytes that are read at once."""

_ALIGNMENT = 8
"""Of the data in a file: the header is filled up with spaces."""

_LARGEST_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16", "I8")
"""The order that safetensors writes tensors in; those of one dtype by name."""

Moved = Callable[[int], None]
"""Told how many more bytes were worked through."""


class ByteSource(Protocol):
    """Bytes that a file is put together from, the same each time they are asked for."""

    @property
    def size(self) -> int:
        """How many."""

    def content(self) -> Iterator[bytes]:
        """The bytes, a buffer at a time."""


class Range(NamedTuple):
    """Bytes ``[start, stop)`` of a file: a :class:`ByteSource`."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def content(self) -> Iterator[bytes]:
        """See :func:`chunks`."""
        return chunks(self)


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: Range

    def rows(self, start: int, stop: int) -> Range:
        """The bytes of its rows ``[start, stop)``."""
        each = self.bytes.size // self.shape[0]
        return self.bytes._replace(start=self.bytes.start + start * each, stop=self.bytes.start + stop * each)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors of a safetensors file that the library has opened before, and so found to be valid."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    begin = 8 + length
    return metadata, {
        name: Stored(
            each["dtype"],
            tuple(each["shape"]),
            Range(path, *(begin + offset for offset in each["data_offsets"])),
        )
        for name, each in header.items()
    }


@dataclass(frozen=True)
class NewFile:
    """A file to be written: these bytes, then those parts."""

    name: str
    ranges: tuple[ByteSource, ...] = ()
    head: bytes = b""

    @cached_property
    def size(self) -> int:
        return len(self.head) + sum(each.size for each in self.ranges)

    def content(self) -> Iterator[bytes]:
        """Its bytes, a buffer at a time.

        Raises:
            CheckpointError: what they come from cannot be read.
        """
        yield from ([self.head] if self.head else [])
        for each in self.ranges:
            yield from each.content()

    def write(self, path: Path, moved: Moved = lambda size: None) -> None:
        """Write it, and have the disk keep it.

        Raises:
            OSError: it cannot be written.
            CheckpointError: what it comes from cannot be read.
        """
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for chunk in self.content():
                left = memoryview(chunk)
                while left:
                    left = left[os.write(handle, left) :]
                moved(len(chunk))
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
        finally:
            os.close(handle)

    def same(self, path: Path, moved: Moved = lambda size: None) -> bool:
        """Whether the file at ``path`` holds just that.

        Raises:
            CheckpointError: one of them cannot be read.
        """
        with _open(path) as handle:
            if os.fstat(handle).st_size != self.size:
                return False
            for chunk in self.content():
                if _read(handle, len(chunk)) != chunk:
                    return False
                moved(len(chunk))
        return True


def tensor_file(
    name: str, metadata: dict[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...], Sequence[ByteSource]]]
) -> NewFile:
    """A safetensors file.

    Args:
        tensors: dtype, shape and bytes of each by name.
    """
    order = sorted(tensors, key=lambda each: (_LARGEST_FIRST.index(tensors[each][0]), each))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    ranges: list[ByteSource] = []
    at = 0
    for each in order:
        dtype, shape, parts = tensors[each]
        size = sum(part.size for part in parts)
        header[each] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        ranges += parts
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return NewFile(name, tuple(ranges), len(text).to_bytes(8, "little") + text)


def chunks(part: Range) -> Iterator[bytes]:
    """The bytes of a range, a buffer at a time.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter.
    """
    with _open(part.path) as handle:
        os.lseek(handle, part.start, os.SEEK_SET)
        left = part.size
        while left:
            chunk = _read(handle, min(left, CHUNK))
            if not chunk:
                raise CheckpointError(f"{part.path} is truncated: it ends before byte {part.stop}; fetch it again")
            yield chunk
            left -= len(chunk)


def equal(one: Sequence[Range], other: Sequence[Range]) -> bool:
    """Whether they hold the same bytes, range by range."""
    return all(
        a.size == b.size and all(x == y for x, y in zip(chunks(a), chunks(b), strict=True))
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def _open(path: Path) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            yield handle
        finally:
            os.close(handle)
    except OSError as error:
        raise unreadable(path, error) from error


def _read(handle: int, size: int) -> bytes:
    """As many bytes as there are, up to ``size``: a single call may return fewer."""
    found = os.read(handle, size)
    while more := os.read(handle, size - len(found)):
        found += more
    return found
