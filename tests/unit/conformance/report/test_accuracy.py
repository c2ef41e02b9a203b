"""Claims of `verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_npu.conformance.report import accuracy
from qwen2_npu.conformance.report.claims import Status
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.optimizations import LADDER, QUANTIZED
from tests.unit.conformance.report.synthetic import Night


def claims(*contents: dict) -> dict[str, accuracy.Claim]:  # type: ignore[type-arg]
    inputs = RunInputs(Path(), verifications={f"verify-{i}.json": content for i, content in enumerate(contents)})
    return {claim.id: claim for claim in accuracy.claims(inputs)}


def test_without_a_verification_nothing_was_run() -> None:
    found = claims()
    assert len(found) == len(LADDER) + 2
    assert {claim.status for claim in found.values()} == {Status.NOT_RUN}


def test_of_a_verification() -> None:
    found = claims(Night(0, wrong_steps=frozenset({"swiglu"})).verification())
    good, bad = found["accuracy/eager/fused_qkv"], found["accuracy/eager/swiglu"]
    assert (good.status, good.label) == (Status.PASS, "qkv融合")
    assert good.reference == "241 positions, 98.00% same token, 4 near-ties excused"
    assert (bad.status, str(bad.value)) == (Status.FAIL, "3.4 × noise")
    assert bad.message.startswith("swiglu: batch ragged")
    assert found["accuracy/eager/greedy text"].status is Status.PASS
    perplexity = found["accuracy/eager/perplexity"]
    assert str(perplexity.value) == "1.1 × noise"
    assert perplexity.reference == "2.4010, stock 2.4000, 508 tokens"


def test_a_step_that_was_left_out_was_not_run() -> None:
    content = Night(0).verification()
    content["rows"] = content["rows"][:-1]
    assert claims(content)[f"accuracy/eager/{LADDER[-1]}"].status is Status.NOT_RUN


def test_modes_are_claims_of_their_own() -> None:
    found = claims(Night(0).verification(), {**Night(0).verification(), "mode": "torchair"})
    assert found["accuracy/torchair/swiglu"].status is Status.PASS


def test_text_and_perplexity_can_fail() -> None:
    content = Night(0).verification()
    content["samples"].append({**content["samples"][0], "divergence": "position 3: a, b", "passed": False})
    content["failures"] = ["perplexity: RMS error of the tokens' losses 1 exceeds 1.5 × noise 0.1"]
    found = claims(content)
    assert found["accuracy/eager/greedy text"].status is Status.FAIL
    assert found["accuracy/eager/greedy text"].message == "position 3: a, b"
    assert found["accuracy/eager/perplexity"].status is Status.FAIL


def test_perplexity_is_shown_against_the_rounding_floor_where_that_is_larger() -> None:
    content = Night(0).verification()
    content["perplexity"]["error"] |= {"floor": 0.02}
    assert claims(content)["accuracy/eager/perplexity"].value.number == pytest.approx(0.55)  # type: ignore[union-attr]


def test_an_excused_divergence_of_text_passes() -> None:
    content = Night(0).verification()
    content["samples"][0] |= {"divergence": "near-tie", "passed": True}
    assert claims(content)["accuracy/eager/greedy text"].status is Status.PASS


def test_steps_beyond_the_ladder_are_shown_where_a_run_has_them() -> None:
    """Those of 8-bit weights, of experts, of several ranks; a step that this version does not know as well."""
    content = Night(0).verification()
    for step in (*QUANTIZED, "fused_moe", "of_another_version"):
        content["rows"].append({**content["rows"][0], "step": step})
    found = claims(content, {**Night(0).verification(), "mode": "torchair"})
    for step in (*QUANTIZED, "fused_moe", "of_another_version"):
        claim = found[f"accuracy/eager/{step}"]
        assert (claim.status, claim.step, claim.place.row) == (Status.PASS, step, step)  # type: ignore[union-attr]
        assert f"accuracy/torchair/{step}" not in found


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_not_hidden_by_another_checkpoint_of_the_same_mode(failing: int) -> None:
    """The quantised one beside the one that it was made of."""
    nights = [Night(0).verification(), Night(0).verification()]
    nights[failing] = Night(0, wrong_steps=frozenset({"swiglu"})).verification()
    assert claims(*nights)["accuracy/eager/swiglu"].status is Status.FAIL
    assert claims(*nights)["accuracy/eager/fused_qkv"].status is Status.PASS
