"""The committed census of every documented graph: ``baselines/graphs/<size>.json``.

A graph that differs from its baseline in either direction is a failure until somebody updates the baseline with a
reason, which is kept beside the numbers.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from qwen2_npu.conformance.files import BASELINES, write_json
from qwen2_npu.conformance.graph.census import FEW, MORE, Census, LayeredCensus, of_layers
from qwen2_npu.conformance.graph.cost import Cost, ExpertsRead, experts_read
from qwen2_npu.conformance.graph.lowering import Lowered, lower_size
from qwen2_npu.conformance.machine.packages import package_version
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import EXPERTS, LADDER, ORIGINAL, PARALLEL, PHASES, QUANTIZED, Optimizations, Phase

FOLDER = BASELINES / "graphs"

PROMPT, CAPACITY = 1024, 2048
"""The guide's protocol: 1024 tokens in, 1024 out."""

PAST = (PROMPT + CAPACITY) // 2 - 1
"""Tokens before the decode step that is the mean of all."""

BATCH = 4
"""Of the ladder's tables."""

SWEEP_STEP = "fused_qkv"
"""The step that the guide's batch sweeps were measured at."""

SWEEPS: dict[str, tuple[int, ...]] = {"7B": (1, 8, 16, 32, 48), "72B-tp8": (1, 2, 8, 16, 32)}
"""Size -> batches of its sweep, beside 4."""

GRAPH_SIZES = ("0.5B", "1.5B", "7B", "7B-tp2", "7B-tp4", "72B-tp8")

MIXTURES: dict[str, tuple[int, ...]] = {"57B-A14B": (1,), "57B-A14B-tp2": (1,), "57B-A14B-tp4": (1, 8, 16, 32)}
"""Size -> batches beside 4. Their graphs need the last step of the ladder: all others look at the host for the experts
of each token."""


EIGHT_BIT_SIZES: dict[str, tuple[int, ...]] = {"0.5B": (), "7B": (1,), "72B-tp8": ()}
"""Size with 8-bit weights -> batches of decode beside 4, where the ordinary weights' last step has a graph as well."""


@dataclass(frozen=True)
class DocumentedGraph:
    """One graph that has a baseline. ``original``: every switch off, which is the stock computation."""

    size: str
    phase: Phase
    batch: int
    step: str

    def __str__(self) -> str:
        return f"{self.size}-{self.key}"

    @property
    def key(self) -> str:
        """Its name in the file of its size."""
        return f"{self.phase}-b{self.batch}-{self.step}"

    @property
    def optimizations(self) -> Optimizations:
        return Optimizations.none() if self.step == ORIGINAL else Optimizations.up_to(self.step)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt; in decode, those before the step."""
        return PROMPT if self.phase == "prefill" else PAST

    @property
    def experts_read(self) -> ExpertsRead:
        """Of each layer of a mixture, but for the last one of a prefill with ``last_layer``."""
        return self._experts_read(self.batch * (self.prompt if self.phase == "prefill" else 1))

    @property
    def last_experts_read(self) -> ExpertsRead:
        """Of the last layer of a prefill with ``last_layer``, which has one token per row."""
        return self._experts_read(self.batch)

    def _experts_read(self, tokens: int) -> ExpertsRead:
        size = SIZES[self.size]
        return experts_read(size.experts, size.per_token, tokens)

    def lowered(self, layers: int | None = None) -> Lowered:
        """What torchair makes of it now, with all layers or so many."""
        return lower_size(
            SIZES[self.size],
            self.phase,
            self.batch,
            self.optimizations,
            prompt=self.prompt,
            capacity=CAPACITY,
            layers=layers,
        )

    def census(self) -> LayeredCensus:
        """The same, counted, from few layers."""
        return of_layers(self.lowered(FEW), self.lowered(MORE))


def documented() -> Iterator[DocumentedGraph]:
    """The ladder at batch 4 for every dense size, then the sweeps; the sizes with tables from ``original`` on. Then the
    mixtures, and 8-bit weights.
    """
    phases: tuple[Phase, ...] = PHASES
    for size in GRAPH_SIZES:
        for phase in phases:
            for step in (ORIGINAL, *LADDER) if size in SWEEPS else LADDER:
                yield DocumentedGraph(size, phase, BATCH, step)
            if SIZES[size].shards > 1 and phase == "prefill":  # in decode it changes nothing
                yield from (DocumentedGraph(size, phase, BATCH, step) for step in PARALLEL)
            for batch in SWEEPS.get(size, ()):
                yield DocumentedGraph(size, phase, batch, SWEEP_STEP)
    for size, batches in MIXTURES.items():
        for phase in phases:
            yield from (DocumentedGraph(size, phase, batch, EXPERTS[-1]) for batch in (BATCH, *batches))
            if SIZES[size].shards > 1 and phase == "prefill":
                yield from (DocumentedGraph(size, phase, BATCH, step) for step in PARALLEL)

    for size, batches in EIGHT_BIT_SIZES.items():
        yield from (DocumentedGraph(size, phase, BATCH, step) for phase in phases for step in QUANTIZED)
        for batch in batches:
            yield from (DocumentedGraph(size, "decode", batch, step) for step in (LADDER[-1], *QUANTIZED))


def path_of(size: str, folder: Path = FOLDER) -> Path:
    """The baseline file of a size."""
    return folder / f"{size}.json"


def load(graph: DocumentedGraph, folder: Path = FOLDER) -> LayeredCensus | None:
    """The baseline; None where there is none."""
    content = _read(path_of(graph.size, folder))
    found = content["graphs"].get(graph.key)
    return None if found is None else LayeredCensus.from_json(found)


def at_full_size(graph: DocumentedGraph, folder: Path = FOLDER) -> Census | None:
    """The baseline with all layers, as its step is expected to run; None where there is none.

    The census charges a mixture the most experts that a step can read; this, those to be expected.
    """
    layered = load(graph, folder)
    if layered is None:
        return None
    whole, grouped = layered.of(SIZES[graph.size].layers), "GroupedMatmul"
    if grouped not in whole.costs:
        return whole
    last = layered.outside.costs.get(grouped, Cost()).weight_bytes
    parts = ((whole.costs[grouped].weight_bytes - last, graph.experts_read), (last, graph.last_experts_read))
    expected = round(sum(nbytes * read.expected / read.most for nbytes, read in parts))
    return replace(whole, costs={**whole.costs, grouped: replace(whole.costs[grouped], weight_bytes=expected)})


def update(graph: DocumentedGraph, census: LayeredCensus, reason: str, folder: Path = FOLDER) -> None:
    """Replace the baseline; atomic, and safe beside other processes.

    The file's own reason and versions are those of its first record; each graph changed since then has its own.
    """
    path = path_of(graph.size, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        content = _read(path)
        if content["graphs"].get(graph.key) == census.to_json():
            return
        content["graphs"][graph.key] = census.to_json()
        why = {
            "reason": reason,
            "versions": {name: package_version(name) for name in ("torch", "torch_npu", "transformers")},
        }
        first = {key: content[key] for key in why} if path.exists() else why
        changed = {**content.get("changed", {}), graph.key: why}
        if why == first:
            del changed[graph.key]
        graphs = dict(sorted(content["graphs"].items()))
        write_json(path, {**first, "changed": dict(sorted(changed.items())), "graphs": graphs})


def provenance(graph: DocumentedGraph, folder: Path = FOLDER) -> str:
    """Why its baseline is what it is, and what lowered it, in words."""
    content = _read(path_of(graph.size, folder))
    why = content.get("changed", {}).get(graph.key, content)
    versions = ", ".join(f"{name} {version}" for name, version in why["versions"].items())
    return f"recorded for {why['reason']!r} with {versions}"


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"graphs": {}}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def difference(expected: LayeredCensus, found: LayeredCensus) -> str:
    """What changed, line by line; empty where nothing did."""
    before, after = (json.dumps(census.to_json(), indent=1).splitlines() for census in (expected, found))
    return "\n".join(difflib.unified_diff(before, after, "baseline", "lowered now", lineterm="", n=2))


def verdict(graph: DocumentedGraph, found: LayeredCensus, folder: Path = FOLDER) -> str:
    """Empty if the graph is as its baseline says; else what differs and the way out."""
    expected = load(graph, folder)
    if expected is None:
        return f"{graph} has no baseline in {path_of(graph.size, folder)}: record one with --update-graphs=REASON"
    changed = difference(expected, found)
    if not changed:
        return ""
    return (
        f"the graph of {graph} is not what its baseline says ({path_of(graph.size, folder)}, "
        f"{provenance(graph, folder)}); "
        f"if it should change, update it with --update-graphs=REASON\n{changed}"
    )
