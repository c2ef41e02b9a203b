"""npu_swiglu(input, dim=-1): silu(first half)·second half, float32 inside, one final rounding.

Tolerance. silu(a)·b = a/(1+exp(-a))·b in float32: exp within 2 ulp (4 u32), the addition 1 (both terms
positive), the division 1, the product 1, and 1 more for an order that multiplies by a reciprocal: r = 8·u32.
Where exp(-a) overflows, silu(a) is below float32's normal range and may be flushed: an absolute
2^-126·(1+|a|)·(1+|b|). The result is the rounding of a value within exact·(1±r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import U32, rounded_band

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(rng: np.random.Generator, shape: Sequence[int], dim: int | None = None, magnitude: float = 1.0) -> Arguments:
    arguments: Arguments = {"input": rng.standard_normal(shape) * magnitude}
    return arguments if dim is None else arguments | {"dim": dim}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    gate, up = np.split(arguments["input"], 2, axis=arguments.get("dim", -1))
    exact = gate / (1.0 + np.exp(-gate)) * up
    slack = 8 * U32 * np.abs(exact) + 2.0**-126 * (1 + np.abs(gate)) * (1 + np.abs(up))
    return (Expected("out", *rounded_band(exact, slack, dtype)),)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    def even(sizes_and_dim: tuple[list[int], int]) -> dict[str, Any]:
        sizes, dim = sizes_and_dim
        dim = dim % (2 * len(sizes)) - len(sizes)
        return {
            "shape": [2 * size if i == dim % len(sizes) else size for i, size in enumerate(sizes)],
            "dim": dim,
        }

    placed = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 7)).map(even)
    return st.tuples(placed, st.sampled_from([1e-3, 1.0, 12.0])).map(lambda made: {**made[0], "magnitude": made[1]})


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"shape": [2, 5, 512]},
    "explicit_last": {"shape": [2, 5, 128], "dim": -1},
    "positive_last": {"shape": [3, 7, 66], "dim": 2},
    "middle": {"shape": [3, 10, 33], "dim": 1},
    "middle_of_even_sizes": {"shape": [3, 10, 32], "dim": 1},
    "first": {"shape": [4, 3, 5], "dim": 0},
    "negative_middle": {"shape": [2, 6, 7], "dim": -2},
    "one_dimensional": {"shape": [130]},
    "halves_of_one": {"shape": [3, 2]},
    "no_rows": {"shape": [0, 64]},
    "saturating": {"shape": [4, 512], "magnitude": 40.0},
    "tiny": {"shape": [4, 64], "magnitude": 1e-4},
}

OPERATOR = OperatorRecord(
    name="npu_swiglu",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("odd_width", {"input": lambda x: x[..., :-1]}, "input|dim", {"shape": [2, 64]}),
        Invalid("odd_middle", {"dim": 1}, "input|dim", {"shape": [2, 3, 64]}),
        Invalid("dim_too_large", {"dim": 3}, "dim", {"shape": [2, 4, 64]}),
        Invalid("dim_too_small", {"dim": -4}, "dim", {"shape": [2, 4, 64]}),
        Invalid("integers", {"input": np.ones((2, 4), np.int32)}, "input", {"shape": [2, 4]}),
    ),
)
