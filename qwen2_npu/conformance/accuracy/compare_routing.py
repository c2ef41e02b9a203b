"""Compares the experts that an optimised mixture would choose with the baseline's, by the rule of near-ties.

The rule is that of tokens (``noise``), with router logits in place of those of the vocabulary. Where the optimised
model would serve a token by other experts than the baseline, it leaves some of the baseline's out and takes others in.
That is excused only if the baseline's largest margin between one that was left out and one that was taken in lies
within twice the largest error of the baseline's own router logits at that place: then the baseline cannot tell which is
larger.

All models have the baseline's experts in the layers and at the positions before (``routing``), so that each choice is
judged on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen2_npu.conformance.accuracy.noise import position_noise
from qwen2_npu.conformance.accuracy.routing import UNKNOWN, Choices

PATHS = {"prefill": "prefill", "hidden": "prefill", "last_token": "prefill", "decode": "decode"}
"""Path of the optimised model -> that of the baseline and the reference which saw the same tokens."""


@dataclass(frozen=True)
class RoutingMismatch:
    """One layer and position where the optimised model would choose other experts. ``position`` counts the tokens of
    the row, from 0."""

    path: str
    layer: int
    row: int
    position: int
    baseline_experts: tuple[int, ...]
    """Those of the baseline that the optimised model leaves out."""
    optimised_experts: tuple[int, ...]
    """Those that it takes in."""
    margin: float
    """The baseline's largest router logit of the former minus its smallest of the latter."""
    noise: float
    """max |baseline − float64| over the router logits of this layer and position, at least half a step of the dtype."""
    excused: bool
    """margin <= 2·noise, and as many experts, each once."""

    def __str__(self) -> str:
        verdict = "within" if self.excused else "beyond"
        theirs, ours = (
            ", ".join(map(str, experts)) or "none" for experts in (self.baseline_experts, self.optimised_experts)
        )
        return (
            f"routing in {self.path}, layer {self.layer} row {self.row} position {self.position}: baseline chooses "
            f"expert {theirs}, optimised {ours}; margin {self.margin:.3g} {verdict} 2 × noise {self.noise:.3g}"
        )


@dataclass(frozen=True)
class RoutingComparison:
    """The choices of an optimised mixture against the baseline's, over all layers, positions and paths."""

    choices: int
    agreements: int
    mismatches: tuple[RoutingMismatch, ...]
    max_error: float
    """max |optimised − baseline| of the router logits."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Path -> positions whose logits could not be compared: compiled steps choose experts by themselves."""

    @property
    def excused(self) -> tuple[RoutingMismatch, ...]:
        return tuple(mismatch for mismatch in self.mismatches if mismatch.excused)

    @property
    def unexcused(self) -> tuple[RoutingMismatch, ...]:
        return tuple(mismatch for mismatch in self.mismatches if not mismatch.excused)

    @property
    def passed(self) -> bool:
        return self.choices > 0 and not self.unexcused

    def failures(self) -> list[str]:
        """What is wrong, one line each; empty when passed."""
        return list(map(str, self.unexcused)) if self.choices else ["no routing was compared"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "choices": self.choices,
            "agreements": self.agreements,
            "excused": [asdict(mismatch) for mismatch in self.excused],
            "unexcused": [asdict(mismatch) for mismatch in self.unexcused],
            "max_error": self.max_error,
            "left_out": dict(self.left_out),
            "passed": self.passed,
        }


def compare_routing(
    optimised: Mapping[str, Choices],
    baseline: Mapping[str, Choices],
    reference: Mapping[str, Choices],
    valid: npt.NDArray[np.bool_],
    dtype: torch.dtype,
    left_out: Mapping[str, int] | None = None,
) -> RoutingComparison:
    """Every layer and position of every path of the optimised model, but for tokens that a layer leaves out.

    Args:
        valid: (B, P) where the prompts have tokens.
        dtype: of the baseline.
        left_out: what the result is to say of positions whose logits could not be compared.
    """
    lengths = valid.sum(axis=1)
    mismatches: list[RoutingMismatch] = []
    choices = agreements = 0
    error = 0.0
    for path, ours in optimised.items():
        stock, true = baseline[PATHS[path]], reference[PATHS[path]]
        if PATHS[path] == "prefill":
            rows, columns = np.nonzero(valid)
            positions = (valid.cumsum(axis=1) - 1)[rows, columns]
        else:
            rows, columns = np.nonzero(np.ones(ours.wanted.shape[1:3], bool))
            positions = lengths[rows] + columns
        for layer, said, theirs, exact, wanted, chosen in zip(
            ours.layers,
            *(each.logits[:, rows, columns] for each in (ours, stock, true)),
            *(each.wanted[:, rows, columns] for each in (ours, stock)),
            strict=True,
        ):
            noise = position_noise(theirs, exact, dtype)
            made = ~(wanted == UNKNOWN).all(axis=-1)
            differ = (np.sort(wanted) != np.sort(chosen)).any(axis=-1) & made
            choices, agreements = choices + int(made.sum()), agreements + int((made & ~differ).sum())
            if made.any():
                error = max(error, float(np.abs(said[made] - theirs[made].astype(np.float64)).max()))
            mismatches += [
                _mismatch(path, layer, int(rows[i]), int(positions[i]), wanted[i], chosen[i], theirs[i], noise[i])
                for i in np.flatnonzero(differ)
            ]
    return RoutingComparison(choices, agreements, tuple(mismatches), error, left_out or {})


def _mismatch(
    path: str,
    layer: int,
    row: int,
    position: int,
    wanted: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.int64],
    logits: npt.NDArray[Any],
    noise: float,
) -> RoutingMismatch:
    ours, theirs = set(wanted.tolist()), set(chosen.tolist())
    out, taken = sorted(theirs - ours), sorted(ours - theirs)
    known = [expert for expert in taken if 0 <= expert < len(logits)]
    margin = float(logits[out].max()) - float(logits[known].min()) if out and known else float("inf")
    return RoutingMismatch(
        path=path,
        layer=layer,
        row=row,
        position=position,
        baseline_experts=tuple(out),
        optimised_experts=tuple(taken),
        margin=margin,
        noise=float(noise),
        excused=len(out) == len(known) and margin <= 2 * float(noise),
    )


def same_so_far(
    optimised: Mapping[str, Choices], baseline: Mapping[str, Choices], valid: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """(B, P + T) where the optimised model makes the baseline's choice in every layer, there and at all positions
    before it: what follows in the row is computed from the same experts, forced or not."""
    same = [
        (np.sort(optimised[path].wanted) == np.sort(baseline[path].wanted)).all(axis=(0, 3))
        for path in ("prefill", "decode")
        if path in baseline
    ]
    same[0] |= ~valid
    joined = np.logical_and.accumulate(np.concatenate(same, axis=1), axis=1)
    joined[:, : valid.shape[1]] &= valid
    return joined
