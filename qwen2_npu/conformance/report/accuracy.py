"""Claims of `qwen2-npu verify`: every step agrees with the stock model, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.optimizations import LADDER

AREA = "Accuracy"
EXPECTED_MODES = ("eager",)
"""Modes of `verify` that every run must show; others are shown where a run has them."""

TEXT, PERPLEXITY = "greedy text", "perplexity"


def expected(modes: tuple[str, ...] = EXPECTED_MODES, others: Sequence[tuple[str, str]] = ()) -> Iterator[Claim]:
    """What every run should check, and ``others`` (mode, step) that a run has beyond it, without a result yet."""
    for mode in modes:
        for step in dict.fromkeys((*LADDER, *(step for where, step in others if where == mode))):
            yield Claim(
                id=f"accuracy/{mode}/{step}",
                area=AREA,
                title=f"{step}, {mode}: the stock model's tokens",
                step=step,
                label=labels().get(step, ""),
                place=Place("ladder", step, AREA, f"verify {mode}"),
            )
        for what in (TEXT, PERPLEXITY):
            yield Claim(f"accuracy/{mode}/{what}", AREA, f"{what}, {mode}: the same as the stock model's")


def claims(inputs: RunInputs) -> list[Claim]:
    """What the run's verifications say."""
    modes = dict.fromkeys([*EXPECTED_MODES, *(_mode(content) for content in inputs.verifications.values())])
    said = [(_mode(content), str(row["step"])) for content in inputs.verifications.values() for row in content["rows"]]
    known = {claim.id: claim for claim in expected(tuple(modes), said)}
    for content in inputs.verifications.values():
        for id, facts in _facts(content):
            if known[id].status is not Status.FAIL:  # which another checkpoint of the same mode does not undo
                known[id] = known[id].found(**facts)
    return list(known.values())


def _mode(content: dict[str, Any]) -> str:
    return str(content.get("mode", "eager"))


def _facts(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    mode = _mode(content)
    common = {
        "subject": f"{content['model']}, {content['dtype']}",
        "verified": Verified.read(content["environment"]["verified"]),
    }
    for row in content["rows"]:
        excused = f", {row['excused']} near-ties excused" if row["excused"] else ""
        facts = {
            "status": _status(row["passed"]),
            "value": Value(float(row["rms_ratio"]), "× noise"),  # NaN stands as a string in JSON
            "reference": f"{row['positions']} positions, {row['agreement']:.2%} same token{excused}",
            "message": row["explanation"],
        }
        yield f"accuracy/{mode}/{row['step']}", common | facts
    if samples := content.get("samples"):
        divergences = [sample["divergence"] for sample in samples if not sample["passed"]]
        facts = {"status": _status(not divergences), "reference": f"{len(samples)} prompts"}
        yield f"accuracy/{mode}/{TEXT}", common | facts | {"message": "; ".join(divergences)}
    if perplexity := content.get("perplexity"):
        failure = next((text for text in content["failures"] if text.startswith(PERPLEXITY)), "")
        shown = f"{perplexity['optimised']:.4f}, stock {perplexity['baseline']:.4f}, {perplexity['tokens']} tokens"
        # As verify judges it: the RMS error of the tokens' losses over the stock model's own.
        value = Value(_noises(perplexity["error"]), "× noise")
        facts = {"status": _status(not failure), "value": value, "reference": shown}
        yield f"accuracy/{mode}/{PERPLEXITY}", common | facts | {"message": failure}


def _noises(error: dict[str, Any]) -> float:
    """``noise.ErrorRatio.ratio``, from its JSON."""
    found, noise = float(error["optimised"]), max(float(error["baseline"]), float(error["floor"]))
    return found / noise if noise else math.inf if found else 0.0


def _status(passed: bool) -> Status:
    return Status.PASS if passed else Status.FAIL
