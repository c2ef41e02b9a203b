"""Compares an optimised trace with the baseline's at every position, by the rules of ``noise``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen2_npu.conformance.accuracy.compare_routing import RoutingComparison, compare_routing, same_so_far
from qwen2_npu.conformance.accuracy.noise import (
    RMS_FACTOR,
    Array,
    ErrorRatio,
    error_ratio,
    position_noise,
    root_mean,
    rounded,
)
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
    """max |baseline − float64| over the vocabulary at this position, at least half a step of the dtype."""
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


PIECE = 1 << 19
"""Logits that are looked at together: what is computed of them stays in the processor's caches."""


@dataclass(frozen=True)
class KnownPath:
    """What ``path`` asks of the baseline and the reference alone: the same for every model that is compared with them.

    Of N positions: ``best`` the baseline's tokens, ``noise``, what ``log_softmax`` takes off the baseline's logits, and
    ``squares`` the mean squares of its errors; the RMS errors of the baseline and of float64 rounded once.
    """

    path: str
    best: npt.NDArray[np.int64]
    noise: Array
    largest: Array
    log_sum: Array
    squares: Array
    rms_baseline: float
    rms_floor: float


def compare_traces(
    optimised: Trace,
    baseline: Trace,
    reference: Trace,
    dtype: torch.dtype,
    known: dict[str, KnownPath] | None = None,
    pooled: bool = False,
) -> Comparison:
    """Every position of every path. All three traces are of the same batch and the same forced tokens.

    Each path is judged on its own: an error in decode must not hide behind a long prefill.

    Args:
        known: filled at the first comparison with these two traces in this dtype, and used by later ones.
        pooled: the noise of a position is at least what is usual, see ``noise``.

    Raises:
        ValueError: the traces are of different tokens, or the baseline itself is not finite.
    """
    if not np.array_equal(optimised.forced, baseline.forced) or not np.array_equal(reference.forced, baseline.forced):
        raise ValueError("the traces were forced to different tokens: nothing to compare")
    valid = compared_prompt = baseline.valid
    lengths = valid.sum(axis=1)
    decoded = np.ones(baseline.forced.shape, bool)
    last = np.ones(len(lengths), bool)
    left_out: dict[str, int] = {}
    if optimised.compiled and baseline.routing:
        same = same_so_far(optimised.routing, baseline.routing, valid)
        compared_prompt, decoded = np.split(same, [valid.shape[1]], axis=1)
        last = compared_prompt[:, -1]
        left_out = {"prefill": int((valid & ~compared_prompt).sum()), "decode": int((~decoded).sum())}
        known = {}  # these positions are compared for this model alone
    known = {} if known is None else known

    def compared(
        path: str,
        logits: tuple[Array, Array, Array],
        where: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
        positions: Array,
    ) -> PathComparison:
        ours, stock, true = (_Rows(each, where) for each in logits)
        if path not in known:
            known[path] = _with_usual_noise(_known_path(path, stock, true, dtype), known, pooled)
        return _compare_logits(path, known[path], ours, stock, true, where[0], positions)

    paths: list[PathComparison] = []
    rows, columns = np.nonzero(compared_prompt)
    if len(rows):
        prefill = optimised.prefill_logits, baseline.prefill_logits, reference.prefill_logits
        paths.append(compared("prefill", prefill, (rows, columns), (valid.cumsum(axis=1) - 1)[rows, columns]))
    if optimised.hidden is not None:
        if baseline.hidden is None or reference.hidden is None:
            raise ValueError(
                "the optimised trace has hidden states, the baseline's has none: run both with hidden=True"
            )
        paths.append(_compare_hidden(optimised.hidden[valid], baseline.hidden[valid], reference.hidden[valid], dtype))
    if optimised.last_logits is not None and last.any():
        rows = np.flatnonzero(last)
        final = optimised.last_logits[:, None], baseline.prefill_logits[:, -1:], reference.prefill_logits[:, -1:]
        paths.append(compared("last_token", final, (rows, np.zeros_like(rows)), (lengths - 1)[rows]))
    if decoded.any():
        rows, steps = np.nonzero(decoded)
        decode = optimised.decode_logits, baseline.decode_logits, reference.decode_logits
        paths.append(compared("decode", decode, (rows, steps), lengths[rows] + steps))
    if not baseline.routing:
        return Comparison(tuple(paths))
    routing = compare_routing(optimised.routing, baseline.routing, reference.routing, valid, dtype, left_out)
    return Comparison(tuple(paths), routing)


@dataclass(frozen=True)
class _Rows:
    """The logits (N, V) at N places of an array (B, S, V), a few at a time: together they are large."""

    logits: Array
    where: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.where[0])

    def __getitem__(self, part: slice) -> Array:
        found: Array = self.logits[self.where[0][part], self.where[1][part]]
        return found

    def pieces(self) -> Iterator[slice]:
        size = max(1, PIECE // self.logits.shape[-1])
        return (slice(start, start + size) for start in range(0, len(self), size))

    def empty(self) -> Array:
        return np.empty((len(self), self.logits.shape[-1]))


def _known_path(path: str, stock: _Rows, true: _Rows, dtype: torch.dtype) -> KnownPath:
    count = len(stock)
    best, noise = np.empty(count, np.int64), np.empty(count)
    largest, log_sum = np.empty((count, 1)), np.empty((count, 1))
    errors, floor = stock.empty(), stock.empty()
    for part in stock.pieces():
        baseline, reference = stock[part], true[part]
        if not np.isfinite(baseline).all():
            raise ValueError(
                f"the baseline's {path} logits are not finite: nothing can be compared with them in {dtype}"
            )
        best[part] = baseline.argmax(-1)
        np.subtract(baseline, reference, out=errors[part])
        noise[part] = position_noise(baseline, reference, dtype)
        np.subtract(rounded(reference, dtype), reference, out=floor[part])
        largest[part], log_sum[part] = normalisers(baseline)
    squares = np.square(errors, out=errors).mean(-1)
    floor_squares = np.square(floor, out=floor)
    return KnownPath(path, best, noise, largest, log_sum, squares, root_mean(squares), root_mean(floor_squares))


def _with_usual_noise(path: KnownPath, known: dict[str, KnownPath], pooled: bool) -> KnownPath:
    """What a few positions cannot say: see ``noise``. Last tokens are positions of the prompt, which comes first."""
    whole = known["prefill"] if path.path == "last_token" else path
    if not pooled:
        return replace(path, rms_baseline=max(path.rms_baseline, whole.rms_baseline))
    worst = np.sort(whole.squares)[-len(path.squares) :]
    usual = root_mean(np.square(whole.noise))
    return replace(path, noise=np.maximum(path.noise, usual), rms_baseline=root_mean(worst))


def _compare_logits(
    path: str,
    known: KnownPath,
    ours: _Rows,
    stock: _Rows,
    true: _Rows,
    rows: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> PathComparison:
    """Logits of N positions, which are ``positions[i]`` of ``rows[i]``."""
    chosen, kl = np.empty(len(ours), np.int64), np.empty(len(ours))
    margin, largest_error, squares = np.empty(len(ours)), [], ours.empty()
    for part in ours.pieces():
        optimised, baseline = ours[part], stock[part].astype(np.float64)
        chosen[part] = optimised.argmax(-1)
        every = np.arange(len(optimised))
        margin[part] = baseline[every, known.best[part]] - baseline[every, chosen[part]]
        largest_error.append(np.abs(optimised - baseline).max())
        np.square(np.subtract(optimised, true[part], out=squares[part]), out=squares[part])
        baseline -= known.largest[part]
        baseline -= known.log_sum[part]
        kl[part] = _kl(baseline, optimised)
    mismatches = tuple(
        Mismatch(
            path=path,
            row=int(rows[i]),
            position=int(positions[i]),
            baseline_token=int(known.best[i]),
            optimised_token=int(chosen[i]),
            margin=float(margin[i]),
            noise=float(known.noise[i]),
            excused=bool(margin[i] <= 2 * known.noise[i]),
        )
        for i in np.flatnonzero(known.best != chosen)
    )
    return PathComparison(
        path=path,
        positions=len(chosen),
        agreements=int((known.best == chosen).sum()),
        mismatches=mismatches,
        max_error=float(np.max(largest_error)),  # NaN stays NaN
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        error=ErrorRatio(root_mean(squares), known.rms_baseline, known.rms_floor),
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
    return _kl(log_softmax(baseline), optimised)


def _kl(log_p: Array, optimised: Array) -> Array:
    """``log_p``: of the baseline; overwritten."""
    difference = log_p - log_softmax(optimised)
    difference *= np.exp(log_p, out=log_p)
    found: Array = difference.sum(axis=-1)
    return found


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    largest, log_sum = normalisers(logits)
    found: Array = logits.astype(np.float64)
    found -= largest
    found -= log_sum
    return found


def normalisers(logits: Array) -> tuple[Array, Array]:
    """(N, V) logits -> (N, 1) each, float64: what ``log_softmax`` takes off them, one after the other."""
    largest = logits.max(axis=-1, keepdims=True).astype(np.float64)
    shifted = logits.astype(np.float64)
    shifted -= largest
    return largest, np.log(np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True))
