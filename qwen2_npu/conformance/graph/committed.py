"""The committed census of every documented graph, read from ``baselines/graphs`` without torch.

The page must be made even where torch or torch_npu cannot be imported: that may be just what it has to say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.files import BASELINES
from qwen2_npu.conformance.sizes import SIZES

FOLDER = BASELINES / "graphs"

_KEY = re.compile(r"(?P<phase>prefill|decode)-b(?P<batch>\d+)-(?P<step>\w+)")


@dataclass(frozen=True)
class CommittedGraph:
    """One graph's census.

    Attributes:
        layer, outside: GE operator -> how many launch a kernel, in one layer and outside of the layers. Negative
            outside where not every layer has all that ``layer`` says: see ``Census.without``.
        flops, nbytes, launches: of the whole graph, all layers.
    """

    size: str
    phase: str
    batch: int
    step: str
    layer: dict[str, int]
    outside: dict[str, int]
    flops: int
    nbytes: int
    launches: int

    def __str__(self) -> str:
        return f"{self.size}-{self.phase}-b{self.batch}-{self.step}"

    @property
    def layer_kernels(self) -> int:
        return sum(self.layer.values())


@cache
def graphs(folder: Path = FOLDER) -> tuple[CommittedGraph, ...]:
    """Every graph that has a baseline; none where there is no folder.

    Raises:
        ValueError: a file is damaged, or of a size that nobody knows.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))["graphs"]
            found += [_graph(path.stem, key, census) for key, census in content.items()]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): take it from version control") from error
    order = list(SIZES)
    return tuple(sorted(found, key=lambda graph: (order.index(graph.size), graph.phase, graph.batch)))


def _graph(size: str, key: str, census: dict[str, Any]) -> CommittedGraph:
    parts = _KEY.fullmatch(key)
    if parts is None or size not in SIZES:
        raise ValueError(f"{size}-{key} is no SIZE-PHASE-bBATCH-STEP")
    layers, total = SIZES[size].layers, Counter[str]()
    for part, times in (("outside", 1), ("layer", layers - census.get("unlike", 0))):
        for cost in census[part]["costs"].values():
            total.update({name: times * number for name, number in cost.items()})
    return CommittedGraph(
        size,
        parts["phase"],
        int(parts["batch"]),
        parts["step"],
        layer={name: cost["launches"] for name, cost in census["layer"]["costs"].items()},
        outside={name: cost["launches"] for name, cost in census["outside"]["costs"].items()},
        flops=total["flops"],
        nbytes=total["weight_bytes"] + total["cache_bytes"] + total["activation_bytes"],
        launches=total["launches"],
    )
