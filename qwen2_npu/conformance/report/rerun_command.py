"""The command that tests one claim alone: to run again by hand, or by ``git bisect run``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from qwen2_npu.conformance.report import accuracy, suites
from qwen2_npu.conformance.report.claims import Claim

_ALONE = {
    "latency": f"pytest -q {suites.path(suites.LATENCY)}{{device}} --gate --gate-rows={{name}}",
    "accuracy": "qwen2-npu verify{device} --mode {name}",
    "suite": "pytest -q tests/accuracy{device} -k {name}",
    "operators": "pytest -q tests/accuracy/test_operators.py{device} -k {name}",
    "graphs": "pytest -q tests/graph/test_census.py tests/perf/test_graph_cost.py -k {name}",
    "relative": "pytest -q {name}{device}",
    "files": "pytest -q {name}{device}",
}
"""By the first word of a claim's id."""


def command(claim: Claim, identity: Mapping[str, Any]) -> str:
    """What to type for ``claim`` alone; empty where nothing tests it alone.

    Args:
        identity: the fingerprint's, of the run that made the claim: a latency counts on the same cores only.
    """
    kind, _, rest = claim.id.partition("/")
    if kind not in _ALONE:
        return ""
    device = f" --device {claim.where.device}" if claim.where.device else ""
    text = _ALONE[kind].format(device=device, name=_name(kind, rest))
    cores = identity.get("affinity")
    return f"taskset -c {cores} {text}" if kind == "latency" and cores else text


def _name(kind: str, rest: str) -> str:
    """What the command calls the claim whose id goes on with ``rest``."""
    if kind == "accuracy":
        mode, _, what = rest.partition("/")
        # No option singles out the text or the perplexity.
        return mode if what in (accuracy.TEXT, accuracy.PERPLEXITY) else f"{mode} --steps {what}"
    if kind == "relative":
        module, function = suites.RATIO
        return shlex.quote(f"{suites.path(module)}::{function}[{rest}]")
    return suites.path(rest) if kind == "files" else rest.rpartition("/")[2]
