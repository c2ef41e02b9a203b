"""How much a correct computation in a dtype may differ, measured on the baseline itself.

Nothing here is a hand-set tolerance. The baseline in its dtype and its float64 self
(:mod:`.stock`) differ by rounding only; that difference is the noise, measured per position or
over a whole tensor.

**Near-ties.** Let ``n`` be the noise of a position: max over the vocabulary of ``|baseline − float64|``, and at least
half a step of the dtype at its largest logit, which is what rounding once may err there. (Where the baseline is lucky
and ``n`` smaller, two neighbours of the dtype could never be a near-tie, and a right model fails that rounds one logit
to the other: seen of fused qkv in bfloat16, margin 0.0625, ``2n`` 0.0594.) The exact
values of two logits lie within ``n`` of the baseline's, so their exact difference lies within ``2n`` of the
baseline's difference. Where the baseline prefers token a over the optimised model's choice b by at most ``2n``, the
baseline itself cannot tell which is larger: the mismatch is excused. Beyond it, rounding of the baseline's size
cannot explain the mismatch. (b's deficit is at least the top-1/top-2 margin, so this is never laxer than testing that
margin.)

**8-bit weights and activations.** What the baseline errs at one position is chance. A model that rounds otherwise may
err where the baseline was lucky, so of a checkpoint with 8-bit weights the noise of a position is at least the RMS of
those of its path, and of last tokens that of the prefill which they are of. 8-bit activations make it necessary: a
value whose quotient by its row's scale lies close to a half goes to one integer or to its neighbour, by whatever
rounding came before it. Such a step is larger than all other rounding: in the logits of the tiny checkpoint the noise
is 3 times that of the same weights without it in bfloat16, and 20 times in float16. Of last tokens their RMS is chance,
too: one position has such a step, or has none. Whatever rounds otherwise may have it there, so k last tokens may err as
the k positions of their prefill where the baseline errs most.

In float32 such steps are too rare to be measured: a whole pass has none or a few, and its noise is 10^-6 or 10^-2. No
NPU operator scales a product of 8-bit activations to float32 either, so ``w8a8`` is not compared there.

**Overall error.** RMS(optimised − float64) ≤ 1.5 · RMS(baseline − float64). A baseline can come out closer to float64
than its dtype lets anyone be expected to: no result written in a dtype can be relied on to be nearer to the exact one
than that one rounded once. So the baseline's RMS counts as at least that of ``round_to_dtype(float64) − float64``: a
function of dtype and reference only, which binds in cases such as a tensor that is the result of one operation.
And the last tokens are one or four positions, whose logits err together as the hidden state before them does: right
models were seen at 1.8 times what the baseline happened to err there. So their noise counts as at least that of the
prefill which they are positions of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

RMS_FACTOR = 1.5
"""How far the optimised model's RMS error may exceed the baseline's."""


@dataclass(frozen=True)
class ErrorRatio:
    """RMS errors against float64. ``noise`` is the baseline's, or the rounding floor where that is larger."""

    optimised: float
    baseline: float
    floor: float

    @property
    def noise(self) -> float:
        return max(self.baseline, self.floor)

    @property
    def ratio(self) -> float:
        """Optimised over noise; 0 where both are exact, infinite where only the noise is zero, NaN stays NaN."""
        if self.noise == 0:
            return 0.0 if self.optimised == 0 else float("inf") if self.optimised > 0 else float("nan")
        return self.optimised / self.noise

    @property
    def within(self) -> bool:
        return self.ratio <= RMS_FACTOR  # False for NaN


def rms(values: Array) -> float:
    """Root of the mean square, in float64; 0 for no values."""
    return root_mean(np.square(values, dtype=np.float64))


def root_mean(squares: Array) -> float:
    """Root of the mean of float64 squares; 0 for none."""
    return float(np.sqrt(np.mean(squares))) if squares.size else 0.0


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """float64 ``values`` rounded once to ``dtype``, as float64."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()


def error_ratio(optimised: Array, baseline: Array, reference: Array, dtype: torch.dtype) -> ErrorRatio:
    """RMS errors of the same values from three models. All arrays of one shape; ``reference`` float64."""
    return ErrorRatio(
        optimised=rms(optimised - reference),
        baseline=rms(baseline - reference),
        floor=rms(rounded(reference, dtype) - reference),
    )


def half_step(values: Array, dtype: torch.dtype) -> Array:
    """Half the distance between neighbours of ``dtype`` around ``values``: the most that rounding once errs there."""
    exponents = np.frexp(values)[1]  # 2^(exponent - 1) <= |value|: half of one unit in its last place
    return np.where(values == 0, 0.0, np.ldexp(torch.finfo(dtype).eps, exponents - 2))


def position_noise(baseline: Array, reference: Array, dtype: torch.dtype) -> Array:
    """(..., V) logits -> (...): the largest error of the baseline at each position, at least that of rounding once."""
    measured = np.abs(baseline - reference).max(axis=-1)
    return np.maximum(measured, half_step(np.abs(baseline).max(axis=-1), dtype))
