"""npu_rotary_mul(input, r1, r2, rotary_mode='half', rotate=None): x·r1 + cat(-x₂, x₁)·r2, out of place.

Shapes: input (.., .., .., D) in any order of axes, r1 (cos) and r2 (sin) broadcast to it, D even and below
896.

Tolerance. The documentation fixes no order of roundings; the coarsest is the eager model's, every operation
in the dtype: each product rounds once and the sum once, so |error| <= u·(|x·r1| + |rot·r2|) from the
products, and u·(|y| + that) from the sum. Each rounding of a subnormal may instead lose ``tiny``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import FORMATS, FloatArray

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def rotate(name: str, x: FloatArray, cos: FloatArray, sin: FloatArray, dtype: str) -> Expected:
    """The rotation of both halves of the last axis, with its bound."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    direct, crossed = x * cos, np.concatenate([-second, first], axis=-1) * sin
    form = FORMATS[dtype]
    products = form.unit * (np.abs(direct) + np.abs(crossed)) + 2 * form.tiny
    value = direct + crossed
    return Expected(name, value, products + form.unit * (np.abs(value) + products) + form.tiny)


def angles(rng: np.random.Generator, positions: int, width: int, theta: float = 1e6) -> tuple[FloatArray, FloatArray]:
    """cos, sin (positions, width) as a model makes them: both halves hold the same angles. Positions are random."""
    frequency = theta ** (-np.arange(0, width, 2) / width)
    angle = rng.integers(0, 4096, size=(positions, 1)) * frequency
    both = np.concatenate([angle, angle], axis=-1)
    return np.cos(both), np.sin(both)


def build(
    rng: np.random.Generator,
    shape: Sequence[int],
    table: Sequence[int],
    free: bool = False,
    magnitude: float = 1.0,
    rotary_mode: str | None = None,
) -> Arguments:
    """``table`` is the shape of r1 and r2; ``free`` fills them with unrelated numbers, so that halves differ."""
    x = rng.standard_normal(shape) * magnitude
    if free:
        r1, r2 = rng.standard_normal(table), rng.standard_normal(table)
    else:
        r1, r2 = (half.reshape(table) for half in angles(rng, int(np.prod(table[:-1])), table[-1]))
    arguments: Arguments = {"input": x, "r1": r1, "r2": r2}
    return arguments if rotary_mode is None else arguments | {"rotary_mode": rotary_mode}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    return (rotate("out", arguments["input"], arguments["r1"], arguments["r2"], dtype),)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    @st.composite
    def parameters(draw: st.DrawFn) -> dict[str, Any]:
        lead = [draw(st.integers(1, 4)) for _ in range(3)]
        width = 2 * draw(st.integers(1, 40))
        table = [draw(st.sampled_from([1, size])) for size in lead]
        return {"shape": [*lead, width], "table": [*table, width], "free": draw(st.booleans())}

    return parameters()


SAMPLES: dict[str, dict[str, Any]] = {
    "BSND": {"shape": [2, 7, 14, 64], "table": [2, 7, 1, 64]},
    "BSND_shared_positions": {"shape": [2, 7, 2, 64], "table": [1, 7, 1, 64]},
    "BNSD": {"shape": [2, 4, 9, 128], "table": [1, 1, 9, 128]},
    "BNSD_ragged_positions": {"shape": [2, 4, 9, 64], "table": [2, 1, 9, 64]},
    "decode": {"shape": [3, 1, 2, 64], "table": [3, 1, 1, 64]},
    "full_table": {"shape": [2, 3, 2, 32], "table": [2, 3, 2, 32], "free": True},
    "different_halves": {"shape": [2, 3, 2, 64], "table": [2, 3, 1, 64], "free": True},
    "explicit_half": {"shape": [1, 3, 2, 64], "table": [1, 3, 1, 64], "rotary_mode": "half"},
    "width_two": {"shape": [1, 3, 2, 2], "table": [1, 3, 1, 2], "free": True},
    "odd_half": {"shape": [1, 3, 2, 6], "table": [1, 3, 1, 6], "free": True},
    "widest": {"shape": [1, 2, 1, 894], "table": [1, 2, 1, 894]},
    "large": {"shape": [1, 3, 2, 64], "table": [1, 3, 1, 64], "magnitude": 1e3},
    "tiny": {"shape": [1, 3, 2, 64], "table": [1, 3, 1, 64], "magnitude": 1e-6},
}

_BASE: dict[str, Any] = {"shape": [2, 3, 2, 64], "table": [2, 3, 1, 64]}

OPERATOR = OperatorRecord(
    name="npu_rotary_mul",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("odd_width", {name: lambda x: x[..., :-1] for name in ("input", "r1", "r2")}, "input", _BASE),
        Invalid("width_896", {}, "input", {"shape": [1, 2, 1, 896], "table": [1, 2, 1, 896]}),
        Invalid("r1_of_other_width", {"r1": lambda r1: r1[..., :32]}, "r1", _BASE),
        Invalid("r2_of_other_width", {"r2": lambda r2: r2[..., :32]}, "r2", _BASE),
        Invalid("r1_of_other_length", {"r1": lambda r1: r1[:, :2]}, "r1", _BASE),
        Invalid("r2_of_other_dtype", {"r2": np.ones((2, 3, 1, 64), np.int32)}, "r2", _BASE),
        Invalid("unknown_mode", {"rotary_mode": "quarter-turn"}, "rotary_mode", _BASE),
        Invalid("rotate_matrix", {"rotate": np.eye(64)}, r"\brotate\b", _BASE),
    ),
)
