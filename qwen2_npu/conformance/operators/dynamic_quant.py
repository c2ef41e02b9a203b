"""npu_dynamic_quant(input, smooth_scales=None) -> (y int8, scale float32): one scale per row, max|row·smooth| / 127.

Tolerance: that of ``quantized.rows``. The product with smooth_scales rounds once in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import quantized
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import U32

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    shape: Sequence[int],
    smooth: bool = False,
    magnitude: float = 1.0,
    zeros: bool = False,
    dst_type: int | None = None,
) -> Arguments:
    """Rows of different sizes; ``zeros``: the first row is zero."""
    x = rng.standard_normal(shape) * magnitude * rng.uniform(0.2, 5.0, (*shape[:-1], 1))
    if zeros:
        x[..., :1, :] = 0.0
    made: Arguments = {"input": x}
    if smooth:
        made["smooth_scales"] = rng.uniform(0.3, 3.0, shape[-1])
    return made if dst_type is None else made | {"dst_type": dst_type}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    smooth = arguments.get("smooth_scales")
    x = arguments["input"] if smooth is None else arguments["input"] * smooth
    return quantized.rows(x, np.zeros_like(x) if smooth is None else U32 * np.abs(x))


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.fixed_dictionaries(
        {
            "shape": st.lists(st.integers(1, 40), min_size=2, max_size=3),
            "smooth": st.booleans(),
            "magnitude": st.sampled_from([1e-3, 1.0, 40.0]),
        }
    )


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"shape": [5, 896], "smooth": True},
    "plain": {"shape": [5, 896]},
    "one_row": {"shape": [1, 3584]},
    "three_dimensional": {"shape": [2, 3, 64], "smooth": True},
    "explicit_type": {"shape": [3, 64], "dst_type": 1},
    "zeros": {"shape": [3, 64], "zeros": True},
    "width_of_one": {"shape": [4, 1]},
    "tiny": {"shape": [4, 64], "magnitude": 1e-2},
    "large": {"shape": [4, 64], "magnitude": 1e2},
}
PORTABLE = ("cpu", "cuda")
"""What the device takes and the portable kernels leave out is refused there alone."""
_BASE: dict[str, Any] = {"shape": [3, 8], "smooth": True}

OPERATOR = OperatorRecord(
    name="npu_dynamic_quant",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("integers", {"input": np.ones((3, 8), np.int32)}, "input", _BASE),
        Invalid("one_dimensional", {"input": lambda x: x[0]}, "input", _BASE),
        Invalid("smooth_too_short", {"smooth_scales": lambda s: s[1:]}, "smooth_scales", _BASE),
        Invalid("smooth_per_row", {"smooth_scales": lambda s: s[None]}, "smooth_scales", _BASE),
        Invalid("groups", {"group_index": np.array([3], np.int32)}, "group_index", _BASE, only_on=PORTABLE),
        Invalid("int4", {"dst_type": 16}, "dst_type", _BASE, only_on=PORTABLE),
        Invalid("per_tensor", {"quant_mode": "pertensor"}, "quant_mode", _BASE, only_on=PORTABLE),
        Invalid("other_maximum", {"dst_type_max": 15.0}, "dst_type_max", _BASE, only_on=PORTABLE),
    ),
    skips=tuple(
        Skip("float32", "CANN's operator takes bfloat16 and float16", name, ("npu", "emulated"), ("float32",))
        for name in SAMPLES
    ),
)
