"""safetensors files put together from byte ranges: what the library itself would write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu.checkpoint import byte_ranges
from qwen2_npu.checkpoint.byte_ranges import NewFile, Range, chunks, equal, read_header, tensor_file
from qwen2_npu.errors import CheckpointError

TENSORS = {
    "b": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
    "a": torch.ones(5, dtype=torch.float16),
    "c": torch.randn(3, 2),
    "d": torch.randn(3, dtype=torch.float64),
    "ä": torch.ones(2, 0, dtype=torch.bfloat16),
}


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "origin.safetensors", metadata={"format": "pt"})
    return tmp_path / "origin.safetensors"


def test_a_copy_is_the_same_file_byte_for_byte(origin: Path, tmp_path: Path) -> None:
    """The header, its order and its padding included."""
    metadata, tensors = read_header(origin)
    for order in (sorted(tensors), sorted(tensors, reverse=True)):  # whichever they are given in
        parts = {name: (tensors[name].dtype, tensors[name].shape, [tensors[name].bytes]) for name in order}
        file = tensor_file("x", metadata, parts)
        assert b"".join(file.content()) == origin.read_bytes()
    file.write(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == origin.read_bytes()
    assert file.size == origin.stat().st_size
    assert file.same(tmp_path / "copy")
    assert file.same(origin)


def test_rows_in_another_order(origin: Path, tmp_path: Path) -> None:
    b = read_header(origin)[1]["b"]
    tensor_file("x", {}, {"new": ("BF16", (3, 3), [b.rows(2, 4), b.rows(0, 1)])}).write(tmp_path / "new")
    assert torch.equal(load_file(tmp_path / "new")["new"], TENSORS["b"][[2, 3, 0]])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_buffers_of_any_size(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "CHUNK", chunk)
    content = bytes(range(250))
    (tmp_path / "in").write_bytes(content)
    file = NewFile("x", (Range(tmp_path / "in", 3, 200), Range(tmp_path / "in", 5, 5)), b"head")
    moved: list[int] = []
    file.write(tmp_path / "out", moved.append)
    assert (tmp_path / "out").read_bytes() == b"head" + content[3:200]
    assert sum(moved) == file.size == 201
    moved.clear()
    assert file.same(tmp_path / "out", moved.append)
    assert sum(moved) == 201


def test_reads_that_give_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for comes in one buffer all the same, and nothing beyond it."""
    (tmp_path / "in").write_bytes(bytes(range(250)))
    real = os.read
    monkeypatch.setattr(byte_ranges, "CHUNK", 10)
    monkeypatch.setattr(os, "read", lambda handle, size: real(handle, min(size, 4)))
    assert list(chunks(Range(tmp_path / "in", 1, 26))) == [bytes(range(a, b)) for a, b in ((1, 11), (11, 21), (21, 26))]
    assert NewFile("x", (Range(tmp_path / "in", 0, 250),)).same(tmp_path / "in")


def test_ranges_that_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own, to the last buffer, and as long."""
    monkeypatch.setattr(byte_ranges, "CHUNK", 2)
    path = tmp_path / "in"
    path.write_bytes(b"abcdeabcdfabcde")
    one, longer = Range(path, 0, 5), Range(path, 0, 6)
    other, same = Range(path, 5, 10), Range(path, 10, 15)
    assert equal([one, other], [same, other])
    assert equal([], [])
    for first, second in (([one], [other]), ([one, one], [same, other]), ([one, one], [other, same])):
        assert not equal(first, second)
    for first, second in ((one, longer), (longer, one), (Range(path, 0, 4), longer), (longer, Range(path, 0, 4))):
        assert not equal([first], [second])


def test_writes_that_take_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:3]))
    NewFile("x", head=b"0123456789").write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"0123456789"


@pytest.mark.parametrize("at", [0, 8, 100, -1])
def test_one_byte_that_differs(at: int, origin: Path) -> None:
    metadata, tensors = read_header(origin)
    specs = {name: (each.dtype, each.shape, [each.bytes]) for name, each in tensors.items()}
    file = tensor_file("x", metadata, specs)
    copy = bytearray(origin.read_bytes())
    copy[at] ^= 1
    changed = origin.parent / "changed"
    changed.write_bytes(copy)
    assert not file.same(changed)
    changed.write_bytes(origin.read_bytes() + b"\0")
    assert not file.same(changed)
    assert not equal([Range(changed, 0, 4)], [Range(changed, 1, 5)])
    assert equal([Range(changed, 0, 4)], [Range(origin, 0, 4)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere cannot be read: No such file"):
        list(chunks(Range(tmp_path / "nowhere", 0, 3)))
    (tmp_path / "short").write_bytes(b"12")
    with pytest.raises(CheckpointError, match=r"short is truncated: it ends before byte 3"):
        list(chunks(Range(tmp_path / "short", 0, 3)))
