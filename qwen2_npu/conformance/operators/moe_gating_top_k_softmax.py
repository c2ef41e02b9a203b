"""npu_moe_gating_top_k_softmax(x, finished=None, k=1): the k largest of softmax(x) per row, not normalised again.

Of equal values the lower expert comes first, as in a stable sort. Finished rows keep their values and get the expert
number E, which no expert has. row_idx[i, j] = j·rows + i over all rows, whatever the dimensions of x.

Tolerance. exp(x - m) in float32: the difference rounds once, |x - m|·u32 in the exponent, and exp is within 2 ulp
(4 u32). The sum of E positive terms has the largest error of a term and E - 1 roundings; the division and the
multiplication by a reciprocal have one each: r = (2·max|x - m| + 8 + E + 1)·u32. Below float32's normal range a value
may be flushed: 2^-126. The values are the roundings of softmax·(1±r).

Two neighbours in the sorted row that differ by less than both errors may come in either order. Where they are not
exactly equal, their experts are not compared, nor those of a whole run of such neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import U32, Array, FloatArray, rounded_band
from qwen2_npu.conformance.operators.tolerance import SECOND_ORDER

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FLUSHED = 2.0**-126


def build(
    rng: np.random.Generator,
    shape: Sequence[int],
    k: int | None = None,
    finished: str = "",
    levels: int = 0,
    magnitude: float = 1.0,
) -> Arguments:
    """``levels``: x takes only so many different values. ``finished``: '', 'some', 'none' or 'all'."""
    x = rng.standard_normal(shape) * magnitude
    if levels:
        x = 0.5 * magnitude * rng.integers(0, levels, shape).astype(np.float64)
    made: Arguments = {"x": x}
    if finished:
        made["finished"] = rng.random(shape[:-1]) < {"some": 0.5, "none": 0.0, "all": 2.0}[finished]
    return made if k is None else made | {"k": k}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    x, k = arguments["x"], arguments.get("k", 1)
    distance = x - x.max(-1, keepdims=True)
    exponentials = np.exp(distance)
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    order = np.argsort(-softmax, -1, kind="stable")
    values = np.take_along_axis(softmax, order, -1)
    relative = SECOND_ORDER * (2 * np.abs(distance).max(-1, keepdims=True) + 9 + x.shape[-1]) * U32
    slack = relative * values + FLUSHED
    experts = order[..., :k]
    finished = arguments.get("finished")
    if finished is not None:
        experts = np.where(finished[..., None], x.shape[-1], experts)
    defined = _order_is_certain(np.take_along_axis(x, order, -1), values, slack)[..., :k]
    if finished is not None:
        defined = defined | finished[..., None]
    rows = int(np.prod(x.shape[:-1]))
    numbers = np.arange(rows * k).reshape(k, rows).T.reshape(experts.shape)
    return (
        Expected("y", *rounded_band(values[..., :k], slack[..., :k], dtype)),
        _integers("expert_idx", experts, defined),
        _integers("row_idx", numbers),
    )


def _order_is_certain(x: FloatArray, values: FloatArray, slack: FloatArray) -> Array:
    """Where a sorted row's order is known: runs of neighbours within their errors are, if they are exactly equal."""
    near = values[..., :-1] - values[..., 1:] <= slack[..., :-1] + slack[..., 1:]
    uncertain = near & (x[..., :-1] != x[..., 1:])
    certain = np.ones(x.shape, bool)
    for row in np.ndindex(x.shape[:-1]):
        starts = np.flatnonzero(np.concatenate([[True], ~near[row]]))
        for start, end in zip(starts, [*starts[1:], x.shape[-1]], strict=True):
            certain[(*row, slice(start, end))] = not uncertain[row][start : end - 1].any()
    return certain


def _integers(name: str, value: Array, defined: Array | None = None) -> Expected:
    return Expected(name, value.astype(np.float64), np.zeros(value.shape), defined, "int32")


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    def with_k(made: tuple[list[int], int, dict[str, Any]]) -> dict[str, Any]:
        shape, k, rest = made
        return {"shape": shape, "k": k % shape[-1] + 1, **rest}

    rest = st.fixed_dictionaries(
        {
            "finished": st.sampled_from(["", "some"]),
            "levels": st.sampled_from([0, 1, 3, 9]),
            "magnitude": st.sampled_from([1e-2, 1.0, 20.0]),
        }
    )
    shapes = st.lists(st.integers(1, 70), min_size=2, max_size=3).map(lambda s: [min(n, 9) for n in s[:-1]] + s[-1:])
    return st.tuples(shapes, st.integers(0, 70), rest).map(with_k)


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"shape": [5, 64], "k": 8},
    "one_row": {"shape": [1, 64], "k": 8},
    "default_k": {"shape": [7, 16]},
    "three_dimensional": {"shape": [3, 4, 60], "k": 4},
    "all_experts": {"shape": [4, 9], "k": 9},
    "one_expert": {"shape": [3, 1], "k": 1},
    "some_finished": {"shape": [9, 32], "k": 3, "finished": "some"},
    "some_finished_three_dimensional": {"shape": [2, 5, 8], "k": 2, "finished": "some"},
    "none_finished": {"shape": [4, 8], "k": 2, "finished": "none"},
    "all_finished": {"shape": [4, 8], "k": 2, "finished": "all"},
    "ties": {"shape": [6, 40], "k": 12, "levels": 3},
    "all_equal": {"shape": [3, 64], "k": 8, "levels": 1},
    "large": {"shape": [4, 64], "k": 8, "magnitude": 60.0},
    "tiny": {"shape": [4, 64], "k": 8, "magnitude": 1e-3},
    "no_rows": {"shape": [0, 8], "k": 2},
}

_BASE: dict[str, Any] = {"shape": [3, 8], "k": 2, "finished": "some"}

OPERATOR = OperatorRecord(
    name="npu_moe_gating_top_k_softmax",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("one_dimensional", {"x": lambda x: x[0]}, "x", _BASE),
        Invalid("four_dimensional", {"x": lambda x: x[None, None]}, "x", _BASE),
        Invalid("no_experts", {"x": lambda x: x[:, :0]}, "x", _BASE),
        Invalid("integers", {"x": np.ones((3, 8), np.int32)}, "x", _BASE),
        Invalid("k_of_zero", {"k": 0}, "k", _BASE),
        Invalid("k_negative", {"k": -1}, "k", _BASE),
        Invalid("k_above_the_experts", {"k": 9}, "k", _BASE),
        Invalid("k_above_the_limit", {"k": 1025}, "k", {"shape": [1, 1100]}),
        Invalid("finished_as_numbers", {"finished": np.ones(3, np.int32)}, "finished", _BASE),
        Invalid("finished_too_short", {"finished": lambda finished: finished[1:]}, "finished", _BASE),
        Invalid("finished_per_expert", {"finished": np.ones((3, 8), bool)}, "finished", _BASE),
    ),
)
