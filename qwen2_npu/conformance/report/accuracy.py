"""Claims of `qwen2-npu verify`: every step agrees with the stock model, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.report.claims import Claim, Place, Status, Value
from qwen2_npu.conformance.report.inputs import RunInputs
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.optimizations import LADDER

AREA = "Accuracy"
EXPECTED_MODES = ("eager",)
"""Modes of `verify` that every run must show; others are shown where a run has them."""

TEXT = "greedy text"
PERPLEXITY = "perplexity"


def expected(modes: tuple[str, ...] = EXPECTED_MODES) -> Iterator[Claim]:
    """What every run should check, without a result yet."""
    for mode in modes:
        for step in LADDER:
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
    known = {claim.id: claim for claim in expected(tuple(modes))}
    for content in inputs.verifications.values():
        for id, facts in _facts(content):
            if id in known:
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
    samples = content.get("samples") or []
    if samples:
        divergences = [sample["divergence"] for sample in samples if not sample["passed"]]
        facts = {"status": _status(not divergences), "reference": f"{len(samples)} prompts"}
        yield f"accuracy/{mode}/{TEXT}", common | facts | {"message": "; ".join(divergences)}
    if content.get("perplexity"):
        perplexity, error = content["perplexity"], content["perplexity"]["error"]
        failure = next((text for text in content["failures"] if text.startswith(PERPLEXITY)), "")
        shown = f"{perplexity['optimised']:.4f}, stock {perplexity['baseline']:.4f}, {perplexity['tokens']} tokens"
        # As verify judges it: the RMS error of the tokens' losses over the stock model's own.
        facts = {"status": _status(not failure), "value": Value(_noises(error), "× noise"), "reference": shown}
        yield f"accuracy/{mode}/{PERPLEXITY}", common | facts | {"message": failure}


def _noises(error: dict[str, Any]) -> float:
    """``noise.ErrorRatio.ratio``, from its JSON."""
    found, noise = float(error["optimised"]), max(float(error["baseline"]), float(error["floor"]))
    if noise == 0:
        return 0.0 if found == 0 else math.inf
    return found / noise


def _status(passed: bool) -> Status:
    return Status.PASS if passed else Status.FAIL
