"""Merged checkpoints: q, k and v of a layer in one tensor, as `qwen2-npu merge-qkv` and the guide's script write them.

The tensor holds the parts of rank 0, then those of rank 1, …: [q0 k0 v0 q1 k1 v1 …]. :meth:`Layout.blocks` is the one
place that says which rows these are. :class:`MergedSource` reads stock tensors, or the part of a rank, out of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from qwen2_npu.checkpoint.configuration import CONFIG_FILE, read_object
from qwen2_npu.checkpoint.folders import is_file
from qwen2_npu.compat import head_dim
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import CUTS, WHOLE, Cutting, Shard, Slice

PARTS = ("q_proj", "k_proj", "v_proj")
"""What is merged, in this order."""

RECORD = "qwen2_npu"
"""Key of config.json under which a merged folder records its layout."""

LAYOUT, VERSION = "fused_qkv", 1
"""What the record says, beside the number of ranks."""

MODULE, MODULE_OF_GUIDE = "qkv_proj", "qkv"
"""What the merged tensor is named after, here and in the guide's script."""

_MERGED = re.compile(rf"(model\.layers\.\d+\.self_attn\.)({MODULE}|{MODULE_OF_GUIDE})\.(weight|bias)")
_PART = re.compile(rf"model\.layers\.\d+\.self_attn\.({'|'.join(PARTS)})\.(weight|bias)")
_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")


class Tensors(Protocol):
    """Tensors under the names that a file has them under. Both sources of :mod:`qwen2_npu.checkpoint.sources`."""

    config: Any
    where: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor and its shape."""

    def stored_dtype(self) -> torch.dtype:
        """What they are stored in."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """What each of them is stored in."""

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, as often as they are asked for."""

    def pieces(self, cuts: Callable[[str], Sequence[Slice | None]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Every tensor with the pieces of it that ``cuts`` names."""


class Block(NamedTuple):
    """Rows ``[start, stop)`` of the stock tensor of ``part`` stand in the merged tensor from row ``at`` on."""

    part: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Layout:
    """How q, k and v stand in one tensor.

    Attributes:
        tp_size: for how many ranks they were merged.
        by_guide: the guide's script cuts rows in ``tp_size`` equal parts, where it tears kv heads that are fewer than
            the ranks. Here such heads are whole, and stand there once for every rank that reads them.
        moved: stock tensors that were in another file than q of their layer, and in which.
    """

    tp_size: int
    by_guide: bool = False
    moved: dict[str, str] = field(default_factory=dict)

    def check(self, config: Any) -> None:
        """Refuse a number of ranks that no model of ``config`` is merged for.

        Raises:
            UnsupportedError: with the numbers that are possible.
        """
        Shard(0, self.tp_size).check(config)
        if self.by_guide and (rows := _rows("k_proj", config)) % self.tp_size:
            raise UnsupportedError(f"tp_size={self.tp_size}: {self.tp_size} ranks do not divide the {rows} rows of k")

    def blocks(self, config: Any) -> tuple[Block, ...]:
        """The rows of a merged tensor, in their order."""
        found: list[Block] = []
        at = 0
        for rank in range(self.tp_size):
            for part in PARTS:
                start, stop = self._rows_of(rank, part, config)
                found.append(Block(part, start, stop, at))
                at += stop - start
        return tuple(found)

    def _rows_of(self, rank: int, part: str, config: Any) -> tuple[int, int]:
        if self.by_guide:
            each = _rows(part, config) // self.tp_size
            return rank * each, (rank + 1) * each
        heads = Shard(rank, self.tp_size).part(CUTS[f"{part}.weight"].unit, config)
        return heads.start * head_dim(config), heads.stop * head_dim(config)

    def record(self) -> dict[str, Any]:
        """What config.json says of it."""
        record = {"layout": LAYOUT, "tp_size": self.tp_size, "version": VERSION}
        return record | {"moved": self.moved} if self.moved else record


def _rows(part: str, config: Any) -> int:
    return WHOLE.count(CUTS[f"{part}.weight"].unit, config) * head_dim(config)


def spans(blocks: Sequence[Block], part: str, start: int, stop: int) -> list[tuple[int, int]]:
    """Where rows ``[start, stop)`` of the stock tensor of ``part`` stand in the merged one: ranges, in order."""
    found: list[tuple[int, int]] = []
    while start < stop:
        block = next(each for each in blocks if each.part == part and each.start <= start < each.stop)
        begin = block.at + start - block.start
        length = min(stop, block.stop) - start
        found.append((begin, begin + length))  # never adjacent to the last: parts of others are in between
        start += length
    return found


# ---- names ----------------------------------------------------------------------------------------------------------
def is_merged(name: str) -> bool:
    """Whether that is the name of a merged tensor."""
    return _MERGED.fullmatch(name) is not None


def stock_names(merged: str) -> dict[str, str]:
    """The parts in a merged tensor, and their stock names."""
    match = _MERGED.fullmatch(merged)
    assert match is not None, merged
    return {part: f"{match[1]}{part}.{match[3]}" for part in PARTS}


def merged_name(stock: str) -> str | None:
    """The merged tensor that a stock tensor belongs into; None for those of other modules."""
    match = _PART.fullmatch(stock)
    return None if match is None else stock.replace(f".{match[1]}.", f".{MODULE}.")


# ---- what a folder says ---------------------------------------------------------------------------------------------
def read_record(folder: Path) -> Layout | None:
    """The layout that config.json records; None where it records none.

    Raises:
        CheckpointError: it is none that is written here.
    """
    path = folder / CONFIG_FILE
    record = read_object(path).get(RECORD) if is_file(path) else None
    if record is None:
        return None
    way_out = "merge the original checkpoint again"
    values = record if isinstance(record, dict) else {}
    version: Any = values.get("version")
    tp_size: Any = values.get("tp_size")
    moved: Any = values.get("moved", {})
    numbers = type(version) is int and type(tp_size) is int and tp_size > 0
    if numbers and version > VERSION:
        raise CheckpointError(
            f"{path}: {RECORD} has version={version}, of a newer qwen2-npu; this one knows {VERSION}: install that one"
        )
    valid = numbers and version == VERSION and values.get("layout") == LAYOUT
    if not valid or not isinstance(moved, dict) or not all(_is_move(*item) for item in moved.items()):
        raise CheckpointError(f"{path}: {RECORD}={record!r:.200} is no layout of merged weights; {way_out}")
    return Layout(tp_size, moved=moved)


def _is_move(name: Any, file: Any) -> bool:
    """A file is one of the folder: no path leads out of it."""
    return _PART.fullmatch(name) is not None and isinstance(file, str) and _FILE.fullmatch(file) is not None


def command(folder: Path | str, *options: str, output: str) -> str:
    """The command line that converts ``folder``, to be copied."""
    words = ("qwen2-npu", "merge-qkv", *options, "--model-path", str(folder), "--output-path", output)
    return shlex.join(words).replace("'N'", "N")


def present(source: Any, folder: Path, *, assume_tp: int | None = None, tp_size: int = 1) -> Any:
    """``source`` as it is where it has stock tensors, and as a :class:`MergedSource` where it has merged ones.

    Args:
        source: tensors under the names that the folder has them under.
        assume_tp: for how many ranks they were merged, where the folder does not record it.
        tp_size: how many ranks load it. A folder merged for several is for as many, or for one that takes everything.

    Raises:
        CheckpointError: merged tensors without a record, or that do not fit it, or another number of ranks.
        UnsupportedError: ``assume_tp`` contradicts the folder.
    """
    if assume_tp is not None and (type(assume_tp) is not int or assume_tp < 1):
        raise UnsupportedError(f"assume_tp={assume_tp!r} must be a positive integer: the number of ranks")
    merged = [name for name in source.shapes() if is_merged(name)]
    if not merged:
        if assume_tp is not None:
            raise UnsupportedError(
                f"assume_tp={assume_tp}: {folder} has no merged q, k and v: it is an ordinary checkpoint; leave "
                "assume_tp out"
            )
        return source
    if (stock := next((name for name in source.shapes() if merged_name(name)), None)) is not None:
        raise CheckpointError(
            f"{folder} has both merged tensors ({merged[0]}) and unmerged ones ({stock}): its files are of two "
            "checkpoints; fetch or merge it again"
        )
    layout = _layout(folder, merged, assume_tp)
    try:
        layout.check(source.config)
    except UnsupportedError as error:
        said = f"assume_tp={assume_tp}" if assume_tp is not None else f"tp_size={layout.tp_size} in {CONFIG_FILE}"
        raise CheckpointError(f"{folder}: {said} is not what it was merged for: {error}") from error
    if tp_size not in (1, layout.tp_size) and layout.tp_size != 1:
        ordinary = f"{folder}-unmerged"
        assumed = () if assume_tp is None else ("--assume-tp", str(assume_tp))
        raise CheckpointError(
            f"{folder} is merged for tp_size={layout.tp_size}, and {tp_size} ranks load it: start {layout.tp_size}, or "
            f"unmerge it: `{command(folder, '--unmerge', *assumed, output=ordinary)}`, and load that, or merge that "
            f"again: `{command(ordinary, '--tp-size', str(tp_size), output=f'{folder}-tp{tp_size}')}`"
        )
    return MergedSource(source, layout, merged)


def _layout(folder: Path, merged: Sequence[str], assume_tp: int | None) -> Layout:
    recorded = read_record(folder)
    if recorded is not None and assume_tp is not None:
        raise UnsupportedError(
            f"assume_tp={assume_tp}: {folder} records that it was merged for tp_size={recorded.tp_size}; leave "
            "assume_tp out"
        )
    if recorded is not None:
        return recorded
    if assume_tp is None:
        unmerge = command(folder, "--unmerge", "--assume-tp", "N", output=f"{folder}-unmerged")
        raise CheckpointError(
            f"{folder} has {len(merged)} merged tensors ({merged[0]}, …), and its {CONFIG_FILE} does not record for "
            f"how many ranks q, k and v were merged (the guide's script records nothing): pass its tp_size as "
            f"--assume-tp N (assume_tp=N in Python; 1 for one card), or convert it once: `{unmerge}`"
        )
    return Layout(assume_tp, by_guide=f".{MODULE_OF_GUIDE}." in merged[0])


class MergedSource:
    """The stock tensors of a merged checkpoint: a :class:`~qwen2_npu.checkpoint.sources.Source`.

    Args:
        inner: the tensors as they are stored.
        merged: the names of the merged ones.

    Raises:
        CheckpointError: a merged tensor has another number of rows than ``layout`` gives it.
    """

    def __init__(self, inner: Tensors, layout: Layout, merged: Sequence[str]) -> None:
        self.inner, self.layout = inner, layout
        self.config, self.where = inner.config, inner.where
        self.blocks = layout.blocks(self.config)
        self._stock = {name: stock_names(name) for name in merged}
        found = inner.shapes()
        last = self.blocks[-1]
        rows = last.at + last.stop - last.start
        for name in merged:
            if found[name][:1] != (rows,):
                raise CheckpointError(
                    f"{self.where}: {name} has shape {found[name]}, and q, k and v merged for tp_size={layout.tp_size} "
                    f"have {rows} rows; "
                    + ("pass the tp_size that it was merged for" if layout.by_guide else "merge the checkpoint again")
                )
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in found.items():
            parts = self._stock.get(name)
            self._shapes |= (
                {name: shape}
                if parts is None
                else {stock: (_rows(part, self.config), *shape[1:]) for part, stock in parts.items()}
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored_dtype(self) -> torch.dtype:
        return self.inner.stored_dtype()

    def tensors(self, cut: Cutting = lambda name: None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stock tensor, or the part of it that ``cut`` says; one layer's q, k and v at a time."""
        for name, pieces in self.inner.pieces(lambda name: self._wanted(name, cut)):
            if name not in self._stock:
                yield name, pieces.pop()
                continue
            for stock, found in self._spans(name, cut):
                rows = [pieces.pop(0) for _ in found]
                yield stock, rows.pop() if len(rows) == 1 else torch.cat(rows)

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These stock tensors, as often as they are asked for."""
        merged = {stock: (name, part) for name, parts in self._stock.items() for part, stock in parts.items()}
        found = self.inner.read(sorted({merged[name][0] if name in merged else name for name in names}))
        read: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in merged:
                read[name] = found[name]
                continue
            stored, part = merged[name]
            rows = spans(self.blocks, part, 0, self._shapes[name][0])
            read[name] = torch.cat([found[stored][start:stop] for start, stop in rows])
        return read

    def _wanted(self, name: str, cut: Cutting) -> list[Slice | None]:
        if name not in self._stock:
            return [cut(name)]
        return [Slice(0, *span) for _, found in self._spans(name, cut) for span in found]

    def _spans(self, merged: str, cut: Cutting) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        for part, stock in self._stock[merged].items():
            wanted = cut(stock) or Slice(0, 0, self._shapes[stock][0])
            assert wanted.axis == 0, "q, k and v are cut by rows"
            yield stock, spans(self.blocks, part, wanted.start, wanted.stop)
