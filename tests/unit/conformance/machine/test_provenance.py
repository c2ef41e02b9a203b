"""What results say of themselves, and contradictions between them."""

from __future__ import annotations

from dataclasses import replace

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.provenance import Provenance, merged
from qwen2_npu.conformance.machine.verified import Verified, Where

SAID = Provenance(
    "a" * 40, False, "2026-10-01T02:00:00+00:00", Verified.read("npu (x)"), Fingerprint.read({"soc": "Ascend910B4"})
)


def test_there_and_back() -> None:
    assert Provenance.from_json(SAID.to_json()) == SAID
    assert Provenance.of_properties(SAID.properties()) == SAID
    assert Provenance.of_properties({"other": "1"}) == Provenance()


def test_of_this_checkout() -> None:
    found = Provenance.of_device("cpu")
    assert found.verified.text.startswith("cpu")
    assert found.identity["device"] == "cpu"
    assert len(found.fingerprint.digest) == 12


def test_of_a_benchmark_file() -> None:
    ours = {"fingerprint": "x", "identity": {"verified": "npu (x)"}}
    content = {"commit_info": {"id": "b" * 40, "dirty": True}, "datetime": "d", "machine_info": {"qwen2_npu": ours}}
    found = Provenance.of_benchmark(content)
    assert (found.commit, found.dirty, found.verified) == ("b" * 40, True, Verified(Where.NPU, "npu (x)"))
    assert Provenance.of_benchmark({"commit_info": {"id": "unknown"}, "machine_info": {}}).commit is None


def test_the_first_that_says_something_is_believed() -> None:
    found, problems = merged(
        [("none", Provenance()), ("partly", Provenance(verified=Verified.read("npu (x)"))), ("all", SAID)]
    )
    assert found == SAID
    assert problems == []


def test_two_commits_on_one_page_are_a_problem() -> None:
    _, (problem,) = merged([("run.json", SAID), ("perf.xml", replace(SAID, commit="b" * 40))])
    assert problem.startswith("perf.xml is of commit bbbbbbbbbbbb, run.json of aaaaaaaaaaaa")
