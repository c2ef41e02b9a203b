"""Compares an optimised trace with the baseline's at every position, by the rules of ``noise``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen2_npu.conformance.accuracy.compare_routing import RoutingComparison, compare_routing, same_so_far
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, Array, ErrorRatio, error_ratio, position_noise
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace


@dataclass(frozen=True)
class Mismatch:
    """One position where the two models prefer different tokens. ``position`` counts the tokens of the row, from 0."""

    path: str
    row: int
    position: int
    baseline_token: int
    optimised_token: int
    margin: float
    """Baseline's logit of its token minus its logit of the optimised model's token."""
    noise: float
    """max |baseline − float64| over the vocabulary at this position."""
    excused: bool
    """margin <= 2·noise."""

    def __str__(self) -> str:
        verdict = "within" if self.excused else "beyond"
        return (
            f"{self.path} row {self.row} position {self.position}: baseline prefers token {self.baseline_token}, "
            f"optimised {self.optimised_token}; margin {self.margin:.3g} {verdict} 2 × noise {self.noise:.3g}"
        )


@dataclass(frozen=True)
class PathComparison:
    """One way through the model: ``prefill``, ``last_token``, ``decode``, or ``hidden`` (no tokens, error only)."""

    path: str
    positions: int
    agreements: int
    mismatches: tuple[Mismatch, ...]
    max_error: float
    """max |optimised − baseline|."""
    kl_mean: float
    kl_max: float
    """KL(baseline || optimised) in nats, over the positions."""
    error: ErrorRatio

    @property
    def excused(self) -> tuple[Mismatch, ...]:
        return tuple(mismatch for mismatch in self.mismatches if mismatch.excused)

    @property
    def unexcused(self) -> tuple[Mismatch, ...]:
        return tuple(mismatch for mismatch in self.mismatches if not mismatch.excused)

    @property
    def passed(self) -> bool:
        return self.error.within and not self.unexcused

    def failures(self) -> Iterator[str]:
        if not self.error.within:
            what = "hidden states" if self.path == "hidden" else "logits"
            yield (
                f"{self.path}: RMS error of the {what} {self.error.optimised:.3g} is {self.error.ratio:.3g} × noise "
                f"{self.error.noise:.3g}, allowed {RMS_FACTOR} ×"
            )
        yield from map(str, self.unexcused)


@dataclass(frozen=True)
class Comparison:
    """An optimised model against the baseline, over all paths."""

    paths: tuple[PathComparison, ...]
    routing: RoutingComparison | None = None
    """Of a mixture of experts."""

    @property
    def _token_paths(self) -> list[PathComparison]:
        return [path for path in self.paths if path.path != "hidden"]

    @property
    def positions(self) -> int:
        return sum(path.positions for path in self._token_paths)

    @property
    def agreements(self) -> int:
        return sum(path.agreements for path in self._token_paths)

    @property
    def agreement(self) -> float:
        """Share of positions with the same top-1 token."""
        return self.agreements / self.positions if self.positions else 0.0

    @property
    def excused(self) -> tuple[Mismatch, ...]:
        return tuple(mismatch for path in self.paths for mismatch in path.excused)

    @property
    def unexcused(self) -> tuple[Mismatch, ...]:
        return tuple(mismatch for path in self.paths for mismatch in path.unexcused)

    @property
    def max_logit_error(self) -> float:
        return max((path.max_error for path in self._token_paths), default=0.0)

    @property
    def kl_mean(self) -> float:
        return (
            sum(path.kl_mean * path.positions for path in self._token_paths) / self.positions if self.positions else 0.0
        )

    @property
    def kl_max(self) -> float:
        return max((path.kl_max for path in self._token_paths), default=0.0)

    @property
    def rms_ratio(self) -> float:
        """The worst path's."""
        ratios = [path.error.ratio for path in self.paths]
        return float("nan") if any(np.isnan(ratios)) else max(ratios, default=0.0)

    @property
    def passed(self) -> bool:
        routed = self.routing is None or self.routing.passed
        return self.positions > 0 and routed and all(path.passed for path in self.paths)

    def failures(self) -> list[str]:
        """What is wrong, one line each; empty when passed."""
        if not self.positions:
            left_out = self.routing is not None and self.routing.left_out
            why = ": the compiled model may choose other experts at every one of them" if left_out else ""
            return [f"no position was compared{why}"]
        found = [line for path in self.paths for line in path.failures()]
        return found if self.routing is None else found + self.routing.failures()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the totals and every path."""
        return {
            "positions": self.positions,
            "agreements": self.agreements,
            "agreement": self.agreement,
            "excused": [asdict(mismatch) for mismatch in self.excused],
            "unexcused": [asdict(mismatch) for mismatch in self.unexcused],
            "max_logit_error": self.max_logit_error,
            "kl_mean": self.kl_mean,
            "kl_max": self.kl_max,
            "rms_ratio": self.rms_ratio,
            "passed": self.passed,
            "paths": {
                path.path: {
                    "positions": path.positions,
                    "agreements": path.agreements,
                    "max_error": path.max_error,
                    "kl_mean": path.kl_mean,
                    "kl_max": path.kl_max,
                    "rms_optimised": path.error.optimised,
                    "rms_baseline": path.error.baseline,
                    "rms_floor": path.error.floor,
                    "rms_ratio": path.error.ratio,
                    "passed": path.passed,
                }
                for path in self.paths
            },
            **({} if self.routing is None else {"routing": self.routing.to_dict()}),
        }


def compare_traces(optimised: Trace, baseline: Trace, reference: Trace, dtype: torch.dtype) -> Comparison:
    """Every position of every path. All three traces are of the same batch and the same forced tokens.

    Each path is judged on its own: an error in decode must not hide behind a long prefill.

    Raises:
        ValueError: the traces are of different tokens, or the baseline itself is not finite.
    """
    if not np.array_equal(optimised.forced, baseline.forced) or not np.array_equal(reference.forced, baseline.forced):
        raise ValueError("the traces were forced to different tokens: nothing to compare")
    valid = compared = baseline.valid
    lengths = valid.sum(axis=1)
    steps = baseline.forced.shape[1]
    decoded = np.ones((len(lengths), steps), bool)
    last = np.ones(len(lengths), bool)
    left_out: dict[str, int] = {}
    if optimised.compiled and baseline.routing:
        same = same_so_far(optimised.routing, baseline.routing, valid)
        compared, decoded = np.split(same, [valid.shape[1]], axis=1)
        last = compared[:, -1]
        left_out = {"prefill": int((valid & ~compared).sum()), "decode": int((~decoded).sum())}
    rows, columns = np.nonzero(compared)
    positions = (valid.cumsum(axis=1) - 1)[rows, columns]
    paths: list[PathComparison] = []
    if len(rows):
        paths.append(
            _compare_logits(
                "prefill", optimised.prefill_logits[compared], baseline.prefill_logits[compared],
                reference.prefill_logits[compared], dtype, rows, positions,
            )
        )  # fmt: skip
    if optimised.hidden is not None:
        if baseline.hidden is None or reference.hidden is None:
            raise ValueError(
                "the optimised trace has hidden states, the baseline's has none: run both with hidden=True"
            )
        paths.append(_compare_hidden(optimised.hidden[valid], baseline.hidden[valid], reference.hidden[valid], dtype))
    if optimised.last_logits is not None and last.any():
        paths.append(
            _compare_logits(
                "last_token", optimised.last_logits[last], baseline.prefill_logits[last, -1],
                reference.prefill_logits[last, -1], dtype, np.flatnonzero(last), (lengths - 1)[last],
            )
        )  # fmt: skip
    if decoded.any():
        rows, step = np.nonzero(decoded)
        ours, stock, true = (trace.decode_logits[decoded] for trace in (optimised, baseline, reference))
        paths.append(_compare_logits("decode", ours, stock, true, dtype, rows, lengths[rows] + step))
    if not baseline.routing:
        return Comparison(tuple(paths))
    routing = compare_routing(optimised.routing, baseline.routing, reference.routing, valid, left_out)
    return Comparison(tuple(paths), routing)


def _compare_logits(
    path: str,
    optimised: Array,
    baseline: Array,
    reference: Array,
    dtype: torch.dtype,
    rows: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> PathComparison:
    """(N, V) logits of N positions, which are ``positions[i]`` of ``rows[i]``."""
    if not np.isfinite(baseline).all():
        raise ValueError(f"the baseline's {path} logits are not finite: nothing can be compared with them in {dtype}")
    best, chosen = baseline.argmax(-1), optimised.argmax(-1)
    every = np.arange(len(best))
    margin = baseline[every, best].astype(np.float64) - baseline[every, chosen]
    noise = position_noise(baseline, reference)
    mismatches = tuple(
        Mismatch(
            path=path,
            row=int(rows[i]),
            position=int(positions[i]),
            baseline_token=int(best[i]),
            optimised_token=int(chosen[i]),
            margin=float(margin[i]),
            noise=float(noise[i]),
            excused=bool(margin[i] <= 2 * noise[i]),
        )
        for i in np.flatnonzero(best != chosen)
    )
    kl = kl_divergence(baseline, optimised)
    return PathComparison(
        path=path,
        positions=len(best),
        agreements=int((best == chosen).sum()),
        mismatches=mismatches,
        max_error=float(np.abs(optimised - baseline.astype(np.float64)).max()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        error=error_ratio(optimised, baseline, reference, dtype),
    )


def _compare_hidden(optimised: Array, baseline: Array, reference: Array, dtype: torch.dtype) -> PathComparison:
    """(N, H) final hidden states: no tokens to agree on, so the error alone."""
    return PathComparison(
        path="hidden",
        positions=len(optimised),
        agreements=0,
        mismatches=(),
        max_error=float(np.abs(optimised - baseline.astype(np.float64)).max()),
        kl_mean=0.0,
        kl_max=0.0,
        error=error_ratio(optimised, baseline, reference, dtype),
    )


def kl_divergence(baseline: Array, optimised: Array) -> Array:
    """(N, V) logits -> (N,) KL(softmax(baseline) || softmax(optimised)) in nats, computed in float64."""
    log_p, log_q = log_softmax(baseline), log_softmax(optimised)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
