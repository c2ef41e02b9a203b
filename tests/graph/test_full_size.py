"""The final presets at full size: layers repeat, so a census of two and four layers speaks for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.baselines import DocumentedGraph
from qwen2_npu.conformance.graph.census import Census
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import QUANTIZED

CODE = """
import json, resource, sys, time
from qwen2_npu import emulator
emulator.activate_where_needed()
import torch
torch.set_num_threads(1)
from qwen2_npu.conformance.graph import baselines, census
from qwen2_npu.conformance.sizes import SIZES
from tests.graph import invariants
graph = next(graph for graph in baselines.documented() if str(graph) == sys.argv[1])
size, start = SIZES[graph.size], time.perf_counter()
lowered = graph.lowered()
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "census": census.take(lowered).to_json(),
    "problems": invariants.problems(lowered, graph.optimizations, size.vocab),
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
}))
"""

PEAK_GB = 4

ROOT = Path(__file__).parents[2]

FINAL = [
    graph
    for graph in baselines.documented()
    if graph.step == SIZES[graph.size].ladder[-1] or (graph.step in QUANTIZED and graph.phase == "decode")
]


@pytest.mark.slow
@pytest.mark.parametrize("graph", FINAL, ids=str)
def test_full_size(graph: DocumentedGraph) -> None:
    """In a process of its own, whose peak memory is measured. No weight is allocated."""
    command = [sys.executable, "-c", CODE, str(graph)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    baseline = baselines.load(graph)
    assert baseline is not None
    expected = baseline.of(SIZES[graph.size].layers)
    assert Census.from_json(found["census"]) == expected
    assert found["problems"] == []
    assert found["peak_gb"] < PEAK_GB
    print(f"{graph}: {found['seconds']:.0f} s, {found['peak_gb']:.2f} GB")
