"""The command that tests one claim alone: every kind of claim has one, and pytest takes it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu.cli.verify import command as verify
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.report import accuracy, rerun_command
from qwen2_npu.conformance.report.claims import Claim
from qwen2_npu.conformance.report.results import Results
from qwen2_npu.optimizations import LADDER

ROOT = Path(__file__).parents[4]
NPU = "npu (Ascend910B4)"
ROW = "7b-ladder-b4-graph-fused_qkv-decode"


@pytest.mark.parametrize(
    ("id", "verified", "expected"),
    [
        (
            f"latency/{ROW}",
            NPU,
            f"taskset -c 0-23 pytest -q tests/perf/test_latency.py --device npu --gate --gate-rows={ROW}",
        ),
        ("accuracy/torchair/swiglu", NPU, "qwen2-npu verify --device npu --mode torchair --steps swiglu"),
        ("accuracy/eager/greedy text", "cpu (portable kernels)", "qwen2-npu verify --device cpu --mode eager"),
        ("suite/accuracy/swiglu", "", "pytest -q tests/accuracy -k swiglu"),
        (
            "operators/npu_rms_norm",
            "emulated (torch_npu)",
            "pytest -q tests/accuracy/test_operators.py --device emulated -k npu_rms_norm",
        ),
        (
            "relative/decode-ours eager-stock eager",
            "cpu (portable kernels)",
            "pytest -q 'tests/perf/test_relative.py::test_ratio_to_the_stock_model[decode-ours eager-stock eager]' "
            "--device cpu",
        ),
        ("files/tests.graph.test_modes", NPU, "pytest -q tests/graph/test_modes.py --device npu"),
        (
            "graphs/7B-decode-b4-fused_qkv",
            NPU,
            "pytest -q tests/graph/test_census.py tests/perf/test_graph_cost.py -k 7B-decode-b4-fused_qkv",
        ),
        ("stages/doctor", NPU, ""),
    ],
)
def test_commands(id: str, verified: str, expected: str) -> None:
    assert rerun_command.command(Claim(id, "", "", verified=Verified.read(verified)), {"affinity": "0-23"}) == expected


def test_a_latency_of_unknown_cores_is_not_pinned() -> None:
    assert rerun_command.command(Claim(f"latency/{ROW}", "", "", verified=Verified.read(NPU)), {}).startswith("pytest ")


def test_every_claim_has_a_command() -> None:
    claims = Results.of(Path("/no/such/folder")).claims
    assert len(claims) > len(documented.read())
    assert [claim.id for claim in claims if not rerun_command.command(claim, {})] == []


FOUND = (
    "operators/scatter_update_",
    "suite/accuracy/ifa_tiling",
    "graphs/7B-decode-b4-fused_qkv",
    "graphs/72B-tp8-decode-b4-add_rms_norm",
    f"latency/{ROW}",
    "relative/decode-ours eager-stock eager",
    "files/tests.perf.test_counts",
)

COLLECT = """
import json, sys
import pytest
for arguments in json.load(sys.stdin):
    status = pytest.main([*arguments, "--collect-only", "-p", "no:cacheprovider"])
    print("status", int(status))
    print("----")
"""


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_pytest_finds_what_the_commands_name() -> None:
    """In one process: collecting imports nearly everything, which takes seconds."""
    commands = [
        shlex.split(rerun_command.command(Claim(id, "", "", verified=Verified.read("cpu (portable kernels)")), {}))
        for id in FOUND
    ]
    assert all(words[0] == "pytest" for words in commands)
    # --gate refuses to run without its device.
    arguments = [[word for word in words[1:] if word != "--gate"] for words in commands]
    run = subprocess.run(
        [sys.executable, "-c", COLLECT], input=json.dumps(arguments),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    answers = run.stdout.split("----\n")[: len(FOUND)]
    assert len(answers) == len(FOUND), run.stdout + run.stderr
    for id, answer in zip(FOUND, answers, strict=True):
        assert "status 0\n" in answer, f"{id}: {answer}{run.stderr}"
        assert id.rpartition("/")[2].rpartition(".")[2] in answer, id


def test_verify_takes_what_the_commands_say() -> None:
    claims = [claim for claim in accuracy.expected() if claim.id.startswith("accuracy/")]
    assert len(claims) == len(LADDER) + 2
    for claim in claims:
        program, subcommand, *words = shlex.split(rerun_command.command(claim, {}))
        assert (program, subcommand) == ("qwen2-npu", "verify")
        verify.make_context(subcommand, words).close()
