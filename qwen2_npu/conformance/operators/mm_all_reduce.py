"""npu_mm_all_reduce_base(x1, x2, hcom, bias, x3): all_reduce(x1 @ x2 + bias + x3) over the ranks of ``hcom``.

Shapes: x1 (M, K) or (B, S, K), x2 (K, N), bias (N,), x3 and the result (M, N) or (B, S, N). bias and x3 are added on
every rank before the sum: n ranks that give the same x3 add n times x3.

The catalogue's samples run in a group of one rank; ``golden_of_ranks`` has the result of several.

Tolerance. Per rank: float32 sums K products and the bias, each product exact for bfloat16 and float16 and rounded once
for float32: |error| <= (K + 1)·u32·(|x1|·|x2| + |bias|) =: s. Its rounding to the dtype adds u·(|p| + s). Adding x3
rounds once more: u·|p + x3|, to first order. The sum over n ranks, in any order, takes n - 1 additions, each rounding
a partial sum that is at most Σ|q| over the ranks: (n - 1)·u·Σ|q|. Here the sum is taken in float32 instead and rounded
once, which is less for every n > 1; for n = 1 nothing is added and nothing rounds. Each rounding of a subnormal may
instead lose ``tiny``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OneRank, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import FORMATS, U32, FloatArray, rounded_band
from qwen2_npu.conformance.operators.tolerance import SECOND_ORDER

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    rows: Sequence[int],
    inner: int,
    columns: int,
    bias: bool = False,
    x3: bool = False,
    magnitude: float = 1.0,
    reduce_op: str | None = None,
) -> Arguments:
    """``rows`` are the dimensions of x1 before its last."""
    made: Arguments = {
        "x1": rng.standard_normal((*rows, inner)) * magnitude,
        "x2": rng.standard_normal((inner, columns)) / np.sqrt(inner),
        "hcom": OneRank(),
    }
    if bias:
        made["bias"] = rng.standard_normal(columns) * magnitude
    if x3:
        made["x3"] = rng.standard_normal((*rows, columns)) * magnitude
    return made if reduce_op is None else made | {"reduce_op": reduce_op}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    return golden_of_ranks([arguments], dtype)


def golden_of_ranks(ranks: Sequence[Arguments], dtype: str) -> tuple[Expected, ...]:
    """The result, the same on every rank, from the arguments of each."""
    unit, tiny = FORMATS[dtype].unit, FORMATS[dtype].tiny
    contributions = [_contribution(arguments, dtype) for arguments in ranks]
    if len(contributions) == 1:
        return (Expected("out", *contributions[0]),)
    total = np.sum([value for value, _ in contributions], axis=0)
    own = np.sum([bound for _, bound in contributions], axis=0)
    largest = np.sum([np.abs(value) + bound for value, bound in contributions], axis=0)
    return (Expected("out", total, own + SECOND_ORDER * (len(ranks) - 1) * (unit * largest + tiny)),)


def _contribution(arguments: Arguments, dtype: str) -> tuple[FloatArray, FloatArray]:
    """What one rank gives, and how far a device's may be from it."""
    form = FORMATS[dtype]
    x1, x2 = arguments["x1"], arguments["x2"]
    bias, x3 = arguments.get("bias", np.zeros(x2.shape[1])), arguments.get("x3")
    exact = x1 @ x2 + bias
    weight = np.abs(x1) @ np.abs(x2) + np.abs(bias)
    slack = SECOND_ORDER * (x1.shape[-1] + 1) * U32 * weight
    value, bound = rounded_band(exact, slack, dtype)
    if x3 is None:
        return value, bound
    return value + x3, bound + form.unit * (np.abs(value + x3) + bound) + form.tiny


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.fixed_dictionaries(
        {
            "rows": st.lists(st.integers(1, 6), min_size=1, max_size=2),
            "inner": st.integers(1, 130),
            "columns": st.integers(1, 70),
            "bias": st.booleans(),
            "x3": st.booleans(),
            "magnitude": st.sampled_from([1e-3, 1.0, 40.0]),
        }
    )


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"rows": [5], "inner": 128, "columns": 96},
    "three_dimensional": {"rows": [2, 7], "inner": 64, "columns": 48},
    "bias": {"rows": [4], "inner": 96, "columns": 33, "bias": True},
    "x3": {"rows": [4], "inner": 96, "columns": 33, "x3": True},
    "bias_and_x3": {"rows": [2, 3], "inner": 160, "columns": 24, "bias": True, "x3": True},
    "explicit_sum": {"rows": [3], "inner": 32, "columns": 16, "reduce_op": "sum"},
    "one_row": {"rows": [1, 1], "inner": 448, "columns": 64},
    "inner_one": {"rows": [3], "inner": 1, "columns": 5, "bias": True},
    "one_column": {"rows": [3], "inner": 17, "columns": 1},
    "large": {"rows": [3], "inner": 64, "columns": 16, "bias": True, "x3": True, "magnitude": 1e3},
    "tiny": {"rows": [3], "inner": 64, "columns": 16, "bias": True, "x3": True, "magnitude": 1e-3},
}

_BASE: dict[str, Any] = {"rows": [2, 3], "inner": 64, "columns": 16, "bias": True, "x3": True}

_SCALES = ("antiquant_scale", "antiquant_offset", "dequant_scale", "pertoken_scale", "comm_quant_scale_1",
           "comm_quant_scale_2")  # fmt: skip
_NUMBERS = {
    "antiquant_group_size": 32,
    "comm_turn": 1,
    "group_sizes": [1, 1, 1],
    "y_dtype": 5,
    "x1_dtype": 5,
    "x2_dtype": 5,
    "dequant_scale_dtype": 5,
    "pertoken_scale_dtype": 5,
    "comm_quant_mode": 1,
    "comm_mode": "ccu",
}

OPERATOR = OperatorRecord(
    name="npu_mm_all_reduce_base",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("four_dimensional", {"x1": lambda x: x[None]}, r"\bx1\b", _BASE),
        Invalid("one_dimensional", {"x1": lambda x: x[0, 0]}, r"\bx1\b", _BASE),
        Invalid("no_rows", {"x1": lambda x: x[:, :0]}, r"\bx1\b", _BASE),
        Invalid("integers", {"x1": np.ones((2, 3, 64), np.int8)}, r"\bx1\b", _BASE),
        Invalid("x2_three_dimensional", {"x2": lambda x: x[None]}, r"\bx2\b", _BASE),
        Invalid("x2_transposed", {"x2": lambda x: x.T}, r"\bx2\b", _BASE),
        Invalid("x2_without_columns", {"x2": lambda x: x[:, :0]}, r"\bx2\b", _BASE),
        Invalid("x2_of_other_dtype", {"x2": np.ones((64, 16), np.int8)}, r"\bx2\b", _BASE),
        Invalid("bias_too_short", {"bias": lambda bias: bias[:-1]}, "bias", _BASE),
        Invalid("bias_of_one_row", {"bias": lambda bias: bias[None]}, "bias", _BASE),
        Invalid("bias_of_other_dtype", {"bias": np.ones(16, np.int32)}, "bias", _BASE),
        Invalid("x3_of_one_row", {"x3": lambda x3: x3[:, :1]}, r"\bx3\b", _BASE),
        Invalid("x3_flat", {"x3": lambda x3: x3.reshape(6, 16)}, r"\bx3\b", _BASE),
        Invalid("x3_of_other_dtype", {"x3": np.ones((2, 3, 16), np.int32)}, r"\bx3\b", _BASE),
        Invalid("another_reduction", {"reduce_op": "max"}, "reduce_op", _BASE),
        Invalid("unknown_group", {"hcom": "nobody"}, "hcom", _BASE, only_on=("cpu", "cuda")),
        *(Invalid(name, {name: np.ones(16)}, name, _BASE) for name in _SCALES),
        *(Invalid(name, {name: value}, name, _BASE) for name, value in _NUMBERS.items()),
    ),
    skips=tuple(
        Skip("float32", "CANN's operator takes bfloat16 and float16", name, ("npu", "emulated"), ("float32",))
        for name in SAMPLES
    ),
)  # fmt: skip
