"""Claims of the graph suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.census import LayeredCensus
from qwen2_npu.conformance.report import graphs
from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import RunInputs
from tests.unit.conformance.report.synthetic import CHANGED_GRAPH, CaseText, Night, write_junit

GRAPH = baselines.DocumentedGraph("7B", "decode", 4, "swiglu")


def claims(tmp_path: Path, *cases: CaseText) -> dict[str, Claim]:
    write_junit(tmp_path / "graph.xml", cases, Night(0).provenance)
    return {claim.id: claim for claim in graphs.claims(RunInputs.of(tmp_path))}


def test_every_documented_graph_is_claimed_and_none_was_run(tmp_path: Path) -> None:
    found = claims(tmp_path)
    assert found.keys() == {f"graphs/{graph}" for graph in baselines.documented()}
    assert {claim.status for claim in found.values()} == {Status.NOT_RUN}


def test_lowered_and_equal(tmp_path: Path) -> None:
    claim = claims(tmp_path, CaseText("tests.graph.test_census", f"test_census_is_the_baseline[{GRAPH}]"))[
        f"graphs/{GRAPH}"
    ]
    assert claim.status is Status.PASS
    assert str(claim.value) == "397 kernels"


def test_other_tests_alone_do_not_say_what_the_graph_is_now(tmp_path: Path) -> None:
    other = CaseText("tests.graph.test_census", f"test_invariants[{GRAPH}]")
    assert claims(tmp_path, other)[f"graphs/{GRAPH}"].status is Status.NOT_RUN


def test_any_failing_test_of_a_graph_fails_it(tmp_path: Path) -> None:
    lowered = CaseText("tests.graph.test_census", f"test_census_is_the_baseline[{GRAPH}]")
    broken = CaseText("tests.graph.test_census", f"test_invariants[{GRAPH}]", failure="kv_in_place: no")
    assert claims(tmp_path, lowered, broken)[f"graphs/{GRAPH}"].status is Status.FAIL
    assert claims(tmp_path, broken)[f"graphs/{GRAPH}"].status is Status.FAIL


def changed(name: str, **numbers: int) -> str:
    """A diff as the graph suite prints it."""
    census = baselines.load(GRAPH)
    assert census is not None
    data = json.loads(json.dumps(census.to_json()))
    data["layer"]["costs"].setdefault(name, dict.fromkeys(next(iter(data["layer"]["costs"].values())), 0)).update(
        numbers
    )
    return baselines.difference(census, LayeredCensus.from_json(data))


@pytest.mark.parametrize("prefix", ["", "E         "])
def test_a_diff_in_one_line(prefix: str) -> None:
    diff = "\n".join(prefix + line for line in changed("Cast", launches=2, activation_bytes=64).splitlines())
    assert graphs.changes(diff) == "Cast launches 0 → 2"
    diff = "\n".join(prefix + line for line in changed("TensorMove", launches=3, flops=7).splitlines())
    assert graphs.changes(diff) == "TensorMove launches 2 → 3"


def test_bytes_are_said_where_no_launch_changed() -> None:
    assert graphs.changes(changed("TensorMove", flops=7)) == "TensorMove flops 0 → 7"


def test_a_number_may_be_negative() -> None:
    assert graphs.changes(changed("Exp", launches=-1)) == "Exp launches 0 → -1"


def test_no_diff_no_changes() -> None:
    assert graphs.changes("AssertionError: no baseline") == ""


def test_a_changed_graph_says_how(night) -> None:  # type: ignore[no-untyped-def]
    claim = night.change(f"graphs/{CHANGED_GRAPH}").claim
    assert claim.reference == "Cast launches 0 → 1"
    assert "+++ lowered now" in claim.message
