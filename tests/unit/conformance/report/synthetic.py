"""SYNTHETIC runs for tests of the report: every number is made up, and every file says so in what it was verified on.

python -m tests.unit.conformance.report.synthetic DIR       # a run and its history, to look at the page
"""

from __future__ import annotations

import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.graph import committed
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.gate import limit_ms
from qwen2_npu.conformance.report.history import Run
from qwen2_npu.conformance.report.results import Results
from qwen2_npu.optimizations import LADDER

IDENTITY: dict[str, Any] = {
    "device": "npu",
    "verified": "npu (SYNTHETIC, no measurement)",
    "soc": "Ascend910B4",
    "machine": "aarch64",
    "torch_npu": "2.13.0",
    "transformers": "4.37.0",
    "cann": "8.2.RC1",
    "affinity": "0-23",
}

NEEDS_CARDS = "needs 8 cards of this kind: npu has 2"

ADDED_CAST = """AssertionError: the graph is not what its baseline says
--- baseline
+++ lowered now
@@ -33,3 +33,10 @@
   "costs": {
-  "nodes": 54,
+  "nodes": 55,
+   "Cast": {
+    "flops": 0,
+    "activation_bytes": 28672,
+    "launches": 1
+   },
    "IncreFlashAttention": {"""


def commit_of(night: int) -> str:
    """Forty hexadecimal digits that look like one."""
    return f"{random.Random(night).getrandbits(160):040x}"


@dataclass(frozen=True)
class Night:
    """One made-up run.

    Attributes:
        slower: row id -> factor on its latency; rows past their limit fail.
        wrong_steps: steps whose tokens are wrong.
        changed_graphs, missing_graphs: names as ``7B-decode-b4-swiglu``.
        self_test: say that latencies were injected.
    """

    number: int
    identity: Mapping[str, Any] = field(default_factory=lambda: dict(IDENTITY))
    slower: Mapping[str, float] = field(default_factory=dict)
    wrong_steps: frozenset[str] = frozenset()
    changed_graphs: frozenset[str] = frozenset()
    missing_graphs: frozenset[str] = frozenset()
    self_test: bool = False

    @property
    def provenance(self) -> Provenance:
        created = f"2026-10-{self.number + 1:02d}T02:00:00+00:00"
        return Provenance(
            commit_of(self.number),
            False,
            created,
            Verified.read(self.identity["verified"]),
            Fingerprint.read(self.identity),
        )

    def write(self, folder: Path) -> Path:
        """All files of the run."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "run.json": {"schema": 1, "provenance": self.provenance.to_json(), "stages": []},
            "verify.json": self.verification(),
            "benchmark.json": self.benchmarks(),
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        write_junit(folder / "graph.xml", self.graph_cases(), self.provenance)
        write_junit(folder / "accuracy.xml", self.accuracy_cases(), self.provenance)
        write_junit(folder / "perf.xml", self.perf_cases(), self.provenance)
        return folder

    def remember(self, folder: Path) -> None:
        """Straight into a history folder, without the files."""
        results = Results.of(self.write(folder.parent / f"night-{self.number}"))
        run = Run.of(results)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{run.name}.json").write_text(json.dumps(run.to_json()), encoding="utf-8")

    # ---- accuracy -------------------------------------------------------------------------------------------------
    def verification(self) -> dict[str, Any]:
        rows = [self._row(index, step) for index, step in enumerate(LADDER)]
        return {
            "schema": 1,
            "created": self.provenance.created,
            "passed": not self.wrong_steps,
            "failures": [row["explanation"] for row in rows if row["explanation"]],
            "environment": {"verified": self.identity["verified"], "device": "npu"},
            "model": "SYNTHETIC checkpoint",
            "dtype": "bfloat16",
            "mode": "eager",
            "rows": rows,
            "samples": [{"prompt": "p", "baseline": "b", "optimised": "b", "divergence": "", "passed": True}],
            "perplexity": {
                "tokens": 508,
                "baseline": 2.4,
                "optimised": 2.401,
                "error": {"optimised": 0.011, "baseline": 0.01, "floor": 0.002},
            },
        }

    def _row(self, index: int, step: str) -> dict[str, Any]:
        wrong = step in self.wrong_steps
        return {
            "step": step,
            "passed": not wrong,
            "positions": 241,
            "agreement": 0.9 if wrong else 0.98,
            "excused": min(index, 5),
            "rms_ratio": 3.4 if wrong else 1.0 + index / 60,
            "explanation": f"{step}: batch ragged: layer 0, mlp: made up" if wrong else "",
            "batches": {"ragged": {"unexcused": [{}] * (19 if wrong else 0)}},
        }

    def accuracy_cases(self) -> Iterable[CaseText]:
        for step in LADDER:
            failure = "made up" if step in self.wrong_steps else ""
            yield CaseText("tests.accuracy.test_ladder", f"test_agrees[up_to_{step}-bfloat16-one-tiny]", failure)
        yield CaseText("tests.accuracy.test_operators", "test_matches_golden[npu_swiglu-tall-bfloat16]")

    # ---- graphs ---------------------------------------------------------------------------------------------------
    def graph_cases(self) -> Iterable[CaseText]:
        for graph in map(str, committed.graphs()):
            if graph not in self.missing_graphs:
                failure = ADDED_CAST if graph in self.changed_graphs else ""
                yield CaseText("tests.graph.test_census", f"test_census_is_the_baseline[{graph}]", failure)

    # ---- latency --------------------------------------------------------------------------------------------------
    def latency(self, number: documented.Documented) -> float:
        """Up to 1 % around 98 % of the documented number."""
        noise = random.Random(f"{self.number} {number.row.id}").uniform(0.99, 1.01)
        return number.ms * 0.98 * noise * self.slower.get(number.row.id, 1.0)

    def perf_cases(self) -> Iterable[CaseText]:
        for number in documented.read():
            failure = skip = ""
            if number.row.configuration.cards > 1:
                skip = NEEDS_CARDS
            elif self.latency(number) > limit_ms(number):
                failure = f"row {number.row.id}: slower: mean {self.latency(number):.4g} ms"
            yield CaseText("tests.perf.test_latency", f"test_latency[{number.row.id}]", failure, skip)

    def benchmarks(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "machine_info": {"qwen2_npu": {"fingerprint": "SYNTHETIC", "identity": dict(self.identity)}},
            "commit_info": {"id": self.provenance.commit, "dirty": False},
            "datetime": self.provenance.created,
            "benchmarks": [
                {"extra_info": self._extra(number)}
                for number in documented.read()
                if number.row.configuration.cards == 1
            ],
        }
        return content | ({"self_test": True} if self.self_test else {})

    def _extra(self, number: documented.Documented) -> dict[str, Any]:
        milliseconds, limit = self.latency(number), limit_ms(number)
        failures = [f"slower: mean {milliseconds:.4g} ms, limit {limit:.4g} ms"] if milliseconds > limit else []
        comparison = {
            "against": "documented on Atlas 800I A2, SKU unknown",
            "statistic": "mean",
            "measured_ms": milliseconds,
            "baseline_ms": number.ms,
            "low": None,
            "high": limit,
        }
        return {
            "row": number.row.id,
            "mean_ms": milliseconds,
            "weights": "random",
            "input_tokens": 1024,
            "decode_steps": 1023,
            "self_test": self.self_test,
            "passed": not failures,
            "failures": failures,
            "notes": [],
            "compared": [comparison],
        }


@dataclass(frozen=True)
class CaseText:
    """One test of a JUnit file."""

    module: str
    name: str
    failure: str = ""
    skip: str = ""


def write_junit(path: Path, cases: Iterable[CaseText], provenance: Provenance) -> None:
    """As pytest writes it."""
    suite = ElementTree.Element("testsuite", timestamp=provenance.created)
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in provenance.properties().items():
        ElementTree.SubElement(properties, "property", name=name, value=value)
    for case in cases:
        element = ElementTree.SubElement(suite, "testcase", classname=case.module, name=case.name)
        if case.failure:
            ElementTree.SubElement(element, "failure", message=case.failure.splitlines()[0]).text = case.failure
        if case.skip:
            ElementTree.SubElement(element, "skipped", message=case.skip).text = f"somewhere.py:1: {case.skip}"
    root = ElementTree.Element("testsuites")
    root.append(suite)
    path.write_text(ElementTree.tostring(root, encoding="unicode"), encoding="utf-8")


DRIFTING, SLOW = "7b-batch-b16-graph-fused_qkv-prefill", "7b-ladder-b4-graph-fused_qkv-decode"
CHANGED_GRAPH, MISSING_GRAPH, WRONG_STEP = "7B-decode-b4-fused_qkv", "0.5B-prefill-b4-swiglu", "swiglu"


def eventful(number: int) -> Night:
    """Nights 0 to 11: quiet, then a drift from 8 on, a slow row and a changed graph from 10 on, wrong tokens in 11."""
    night = Night(number)
    if number >= 8:
        night = replace(night, slower={DRIFTING: 1.05})
    if number >= 10:
        night = replace(night, slower={DRIFTING: 1.05, SLOW: 1.16}, changed_graphs=frozenset({CHANGED_GRAPH}))
    if number >= 11:
        night = replace(night, wrong_steps=frozenset({WRONG_STEP}), missing_graphs=frozenset({MISSING_GRAPH}))
    return night


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for index in range(11):
        eventful(index).remember(target / "history")
    eventful(11).write(target)
    print(target)
