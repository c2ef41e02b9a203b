"""What all ranks of a job must hold alike: versions, checkpoint, options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel import launch
from qwen2_npu.parallel.launch import RankGroup

PACKAGES = ("qwen2-npu", "torch", "torch_npu", "transformers", "deepspeed")

SHOWN = 60
"""Characters of a value that are shown."""

ABSENT = "none"


def agree(
    facts: Mapping[str, Any], *, way_out: str = "give all ranks the same", group: RankGroup | None = None
) -> None:
    """Compare ``facts`` with those of the other ranks. Every rank of the group calls it, in the same order.

    Args:
        facts: name -> value, which JSON can hold.
        way_out: what a user does where they differ.
        group: default: the current one. Without one, or alone, there is nothing to compare.

    Raises:
        UnsupportedError: on every rank, with the same message: which rank differs from rank 0, and in what.
    """
    said = of_all_ranks(dict(facts), group)
    for rank, own in enumerate(said):
        for name in dict.fromkeys((*said[0], *own)):
            first, other = _text(said[0].get(name)), _text(own.get(name))
            if first != other:
                first, other = _shown(first, other)
                raise UnsupportedError(f"rank {rank} has {name} {other}, rank 0 has {first}: {way_out}")


def of_all_ranks(value: Any, group: RankGroup | None = None) -> list[Any]:
    """What every rank holds. Every rank of the group calls it, in the same order as :func:`agree`.

    Args:
        value: this rank's, which JSON can hold.
        group: default: the current one.

    Returns:
        In the order of the ranks; ``value`` alone where there is one.
    """
    group = group or launch.current()
    if group is None or group.store is None:
        return [value]
    call = group.store.add(f"agreements/{group.rank}", 1)
    group.store.set(f"agree/{call}/{group.rank}", json.dumps(value))
    return [json.loads(group.store.get(f"agree/{call}/{rank}")) for rank in range(group.world_size)]


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells one checkpoint folder from another without reading its weights.

    Returns:
        File -> a hash: of JSON files as they are, of safetensors files their header and size, of other weights the
        size.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            content = path.read_bytes()
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                content = file.read(min(length, 100_000_000)) + str(path.stat().st_size).encode()
        elif path.suffix == ".bin":
            content = str(path.stat().st_size).encode()
        else:
            continue
        found[path.name] = hashlib.sha256(content).hexdigest()[:12]
    return found


def _text(value: Any) -> str:
    return ABSENT if value is None else str(value)


def _shown(first: str, other: str) -> tuple[str, str]:
    """Both in one line each; of long ones the part where they begin to differ."""
    pair = [" ".join(text.split()) for text in (first, other)]
    if pair[0] == pair[1]:  # they differ in white space alone
        pair = [repr(first), repr(other)]
    if max(map(len, pair)) <= SHOWN:
        return pair[0], pair[1]
    same = next((place for place, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
    start = max(0, same - SHOWN // 3)
    cut = [("…" if start else "") + text[start : start + SHOWN] for text in pair]
    cut = [part + ("…" if len(text) > start + SHOWN else "") for part, text in zip(cut, pair, strict=True)]
    return cut[0], cut[1]
