"""`qwen2-npu merge-qkv`: what a merged folder, or an unmerged one, consists of. It is written by ``merging``.

Every file of weights becomes one of the same name, in which q, k and v of a layer are replaced by the merged tensor, or
the other way round. A layer whose k or v is in another file than its q is recorded, so that unmerging restores the
same files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2_npu.checkpoint import merged
from qwen2_npu.checkpoint.byte_ranges import Range, Stored, read_header
from qwen2_npu.checkpoint.configuration import CONFIG_FILE, read_config
from qwen2_npu.checkpoint.folder_plan import (
    FolderPlan,
    Spec,
    opened,
    plain,
    plan_of,
    read_text,
    separate,
    unmerged,
    with_first,
)
from qwen2_npu.checkpoint.folders import locked
from qwen2_npu.checkpoint.merged import Layout, MergedSource
from qwen2_npu.checkpoint.naming import Renamed
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.shards import weights_files
from qwen2_npu.checkpoint.weights import check_source, held_shapes, stock_shapes
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Shard


def plan_merge(source: str | Path, output: str | Path, *, tp_size: int = 1) -> FolderPlan:
    """What merging the checkpoint in ``source`` for ``tp_size`` ranks writes to ``output``. Nothing is written yet.

    Raises:
        CheckpointError: what is wrong with ``source`` or ``output``; ``source`` is merged already.
        UnsupportedError: a number of ranks that the model cannot be cut for.
    """
    folder = separate(source, output)
    layout = Layout(tp_size)
    with locked(folder, shared=True):
        config = _float_config(folder)
        layout.check(config)
        stored, headers = unmerged(folder, config, _already_merged)

    blocks = layout.blocks(config)
    found = {name: each for _, tensors in headers.values() for name, each in tensors.items()}
    file_of = {name: file for file, (_, tensors) in headers.items() for name in tensors}
    new: dict[str, dict[str, Spec]] = {file: {} for file in headers}
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
    text = read_text(folder / CONFIG_FILE)
    names = stored.names if isinstance(stored, Renamed) else {}
    by_stock_name = {names.get(name, name): each for name, each in found.items()}
    return plan_of(
        folder, output, {"merge": tp_size}, headers, new,
        config_text=with_record(text, Layout(tp_size, moved=moved)),
        read_by_rank=tuple(_read_by(Shard(rank, tp_size), stored.config, by_stock_name) for rank in range(tp_size)),
    )  # fmt: skip


def plan_unmerge(
    source: str | Path, output: str | Path, *, assume_tp: int | None = None, tp_size: int | None = None
) -> FolderPlan:
    """What restoring the ordinary checkpoint of the merged one in ``source`` writes. Nothing is written yet.

    Args:
        assume_tp: for how many ranks it was merged, where it does not record that.
        tp_size: for how many it is expected to be; None for any number.

    Raises:
        CheckpointError: what is wrong with ``source`` or ``output``; ``source`` is not merged.
        UnsupportedError: a number of ranks that contradicts it.
    """
    folder = separate(source, output)
    with locked(folder, shared=True):
        config = _float_config(folder)
        files = plain(folder, weights_files(folder, config=config))
        stored = merged.present(opened(folder, config, files), folder, assume_tp=assume_tp)
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
    text = without_record(read_text(folder / CONFIG_FILE))
    return plan_of(folder, output, options, headers, new, config_text=text, replicas=tuple(replicas))


def _float_config(folder: Path) -> Any:
    """The configuration of a folder whose weights are not quantised.

    Raises:
        CheckpointError: what is wrong with it; or they are.
    """
    config = read_config(folder)
    if (quantization := quantization_of(config)) is not None:
        raise CheckpointError(
            f"{folder} has 8-bit weights ({quantization.scheme}), and only floating-point ones are merged: load it as "
            "it is; q, k and v are fused while it is loaded"
        )
    return config


def _replicas(tensor: Stored, blocks: Sequence[merged.Block]) -> list[tuple[Range, Range]]:
    first: dict[tuple[str, int], merged.Block] = {}
    found = []
    for block in blocks:
        kept = first.setdefault((block.part, block.start), block)
        if kept is not block:
            size = block.stop - block.start
            found.append((tensor.rows(kept.at, kept.at + size), tensor.rows(block.at, block.at + size)))
    return found


# ---- config.json ---------------------------------------------------------------------------------------
def with_record(text: str, layout: Layout) -> str:
    """config.json with the record of ``layout`` as its first field, and otherwise as it is."""
    return with_first(_field(layout.record()), without_record(text))


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
