"""Claims that stand for many tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_npu.conformance.machine.verified import Verified, Where
from qwen2_npu.conformance.report import junit, suites
from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.suites import Tally
from tests.unit.conformance.report.synthetic import IDENTITY, CaseText, Night, write_junit

NPU = Verified.read(IDENTITY["verified"])


def case(
    outcome: junit.Outcome, name: str = "test_a[x]", module: str = "tests.accuracy.test_ladder"
) -> junit.JUnitCase:
    function, _, parameters = name.removesuffix("]").partition("[")
    return junit.JUnitCase(module, function, parameters, outcome, "why" if outcome != "passed" else "")


def test_one_failure_fails_the_tally() -> None:
    tally = Tally.of([(case("passed"), NPU), (case("failed"), NPU), (case("skipped"), NPU)])
    assert tally.status is Status.FAIL
    assert tally.message == "test_a[x]: why"
    assert str(tally) == "1 passed, 1 failed, 1 skipped"


def test_skips_alone_are_no_pass() -> None:
    tally = Tally.of([(case("skipped"), NPU)] * 2)
    assert tally.status is Status.NOT_RUN
    assert tally.message == "2 skipped: why"


def test_many_failures_are_counted() -> None:
    assert Tally.of([(case("failed"), NPU)] * 5).message.endswith("and 2 more")


def test_two_devices_do_not_speak_for_one_another() -> None:
    assert (
        Tally.of([(case("passed"), NPU), (case("passed"), Verified.read("cpu (portable kernels)"))]).verified
        == Verified()
    )


def claims(tmp_path: Path, *cases: CaseText, verified: Verified = NPU) -> dict[str, Claim]:
    provenance = Night(0, identity={**IDENTITY, "verified": verified.text}).provenance
    write_junit(tmp_path / "j.xml", cases, provenance)
    return {claim.id: claim for claim in suites.claims(RunInputs.of(tmp_path))}


LADDER_TEST, OPERATOR_TEST = "tests.accuracy.test_ladder", "tests.accuracy.test_operators"


def test_steps_operators_and_the_rest(tmp_path: Path) -> None:
    found = claims(
        tmp_path,
        CaseText(LADDER_TEST, "test_agrees[up_to_fused_qkv-bfloat16-one-tiny]"),
        CaseText(LADDER_TEST, "test_agrees[only_swiglu-bfloat16-one-tiny]", failure="wrong"),
        CaseText(LADDER_TEST, "test_none[none-bfloat16]"),
        CaseText(OPERATOR_TEST, "test_matches_golden[npu_rms_norm-tall-float16]"),
        CaseText(OPERATOR_TEST, "test_matches_golden[scatter_update_-first-float16]", failure="off by one"),
        CaseText(OPERATOR_TEST, "test_matches_golden[npu_prompt_flash_attention-long-float16]", failure="off by one"),
    )
    assert found["suite/accuracy/fused_qkv"].status is Status.PASS
    assert found["suite/accuracy/swiglu"].status is Status.FAIL
    assert found["suite/accuracy/ifa_tiling"].status is Status.NOT_RUN
    assert found["suite/accuracy/flash_attention"].status is Status.NOT_RUN, "an operator is not the step"
    assert found["operators/npu_rms_norm"].status is Status.PASS
    assert found["operators/npu_add_rms_norm"].status is Status.NOT_RUN
    assert found["operators/scatter_update_"].status is Status.FAIL
    assert found["operators/scatter_update"].status is Status.NOT_RUN
    # What has a claim of its own fails there, once.
    assert found[f"files/{LADDER_TEST}"].status is Status.PASS
    assert f"files/{OPERATOR_TEST}" not in found


def test_a_test_file_that_did_not_run_is_shown(tmp_path: Path) -> None:
    found = claims(
        tmp_path, CaseText("tests.elsewhere.test_x", "test_y"), CaseText(suites.LATENCY, "", "cannot import")
    )
    assert found[f"files/{suites.LATENCY}"].status is Status.FAIL, "it has no row that could say so"
    for module in (
        "tests.accuracy.test_negative_controls",
        "tests.graph.test_recompiles",
        "tests.perf.test_fail_closed",
    ):
        assert found[f"files/{module}"].status is Status.NOT_RUN
    assert found["files/tests.elsewhere.test_x"].status is Status.PASS


@pytest.mark.parametrize(
    ("verified", "where"),
    [
        (NPU, Where.NPU),
        (Verified.read("cuda (portable kernels)"), Where.CUDA),
        (Verified.read("emulated (torch_npu)"), Where.CPU),
    ],
)
def test_a_ratio_is_of_the_device_that_computed_it(verified: Verified, where: Where, tmp_path: Path) -> None:
    text = "1.72 (1.62 to 1.92 with 98% confidence, 12 rounds)"
    write_junit(
        tmp_path / "j.xml",
        [CaseText(*suites.RATIO)],
        Night(0, identity={**IDENTITY, "verified": verified.text}).provenance,
    )
    plain = (tmp_path / "j.xml").read_text(encoding="utf-8")
    with_ratio = plain.replace(
        f'name="{suites.RATIO[1]}" />',
        f'name="{suites.RATIO[1]}[decode-a-b]">'
        f'<properties><property name="ratio" value="{text}"/></properties></testcase>',
    )
    (tmp_path / "j.xml").write_text(with_ratio, encoding="utf-8")
    (claim,) = (claim for claim in suites.claims(RunInputs.of(tmp_path)) if claim.area == suites.RATIOS)
    assert (claim.id, claim.status, claim.where) == ("relative/decode-a-b", Status.PASS, where)
    assert claim.value is not None
    assert not claim.value.lower_is_better
    assert (claim.value.number, claim.reference) == (1.72, text)
