"""The command that tests one claim alone: to run again by hand, or by ``git bisect run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2_npu.conformance.report.claims import Claim, Where

_DEVICES = {Where.NPU: "npu", Where.EMULATED: "emulated", Where.CPU: "cpu", Where.CUDA: "cuda"}

_ALONE = {
    "latency": "pytest -q tests/perf/test_latency.py{device} --gate --gate-rows={name}",
    "accuracy": "qwen2-npu verify{device}{mode} --steps {name}",
    "suite": "pytest -q tests/accuracy{device} -k {name}",
    "operators": "pytest -q tests/accuracy/test_operators.py{device} -k {name}",
    "graphs": "pytest -q tests/graph/test_census.py tests/perf/test_graph_cost.py -k {name}",
    "relative": "pytest -q tests/perf/test_relative.py{device} -k {name}",
    "files": "pytest -q {name}{device}",
}
"""By the first word of a claim's id."""

WHOLE_RUNS = ("greedy text", "perplexity")
"""Claims of `verify` that no option singles out."""


def command(claim: Claim, identity: Mapping[str, Any]) -> str:
    """What to type for ``claim`` alone; empty where nothing tests it alone.

    Args:
        identity: the fingerprint's, of the run that made the claim: a latency counts on the same cores only.
    """
    kind, _, rest = claim.id.partition("/")
    form = _ALONE.get(kind)
    if form is None:
        return ""
    name, mode = rest.rpartition("/")[2], rest.partition("/")[0]
    if kind == "files":
        name = rest.replace(".", "/") + ".py"
    if kind == "accuracy" and name in WHOLE_RUNS:
        form = form.partition(" --steps")[0]
    device = _DEVICES.get(claim.where)
    text = form.format(device=f" --device {device}" if device else "", mode=f" --mode {mode}", name=name)
    cores = identity.get("affinity")
    return f"taskset -c {cores} {text}" if kind == "latency" and cores else text
