"""npu_weight_quant_batchmatmul(x, weight int8, antiquant_scale, bias=None): x @ (weight · scale) + bias.

Tolerance. A device may round weight·scale to the dtype before the product, or scale the sums: u·|x|·|weight·scale|
covers both. float32 sums K products and the bias: (K + 2)·u32·(|x|·|weight·scale| + |bias|). One rounding at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import quantized
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import FORMATS, U32, rounded_band
from qwen2_npu.conformance.operators.tolerance import SECOND_ORDER

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    rows: int,
    inner: int,
    columns: int,
    bias: str = "",
    flat: bool = True,
    inner_precise: int | None = None,
) -> Arguments:
    """``bias``: '', 'float32', or 'dtype' for that under test. ``flat``: vectors are (N,), else (1, N)."""
    scale = rng.uniform(0.2, 5.0, columns) / (127 * np.sqrt(inner))
    made: Arguments = {"x": rng.standard_normal((rows, inner)), "weight": quantized.int8(rng, inner, columns)}
    made["antiquant_scale"] = scale if flat else scale[None]
    if bias:
        addends = rng.standard_normal(columns) * 3
        addends = addends.astype(np.float32) if bias == "float32" else addends
        made["bias"] = addends if flat else addends[None]
    return made if inner_precise is None else made | {"inner_precise": inner_precise}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    x = arguments["x"]
    weight = arguments["weight"] * arguments["antiquant_scale"].reshape(1, -1)
    bias = arguments.get("bias", np.zeros(1)).astype(np.float64).reshape(1, -1)
    size = np.abs(x) @ np.abs(weight)
    slack = FORMATS[dtype].unit * size + (x.shape[-1] + 2) * U32 * (size + np.abs(bias))
    return (Expected("y", *rounded_band(x @ weight + bias, SECOND_ORDER * slack, dtype)),)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    sizes = {"rows": st.integers(1, 9), "inner": st.integers(1, 70), "columns": st.integers(1, 40)}
    return st.fixed_dictionaries({**sizes, "flat": st.booleans()})


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"rows": 4, "inner": 64, "columns": 48},
    "one_row": {"rows": 1, "inner": 896, "columns": 33},
    "odd": {"rows": 3, "inner": 67, "columns": 35},
    "two_dimensional_scale": {"rows": 3, "inner": 64, "columns": 32, "flat": False},
    "wide_bias": {"rows": 3, "inner": 64, "columns": 32, "bias": "float32"},
    "bias": {"rows": 3, "inner": 64, "columns": 32, "bias": "dtype", "flat": False},
    "inner_precise": {"rows": 3, "inner": 64, "columns": 32, "inner_precise": 1},
    "inner_one": {"rows": 2, "inner": 1, "columns": 5},
}
PORTABLE = ("cpu", "cuda")
"""What the device takes and the portable kernels leave out is refused there alone."""
_BASE: dict[str, Any] = {"rows": 3, "inner": 8, "columns": 4, "bias": "float32"}
_DEVICES = ("npu", "emulated")

OPERATOR = OperatorRecord(
    name="npu_weight_quant_batchmatmul",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("x_of_integers", {"x": np.ones((3, 8), np.int8)}, "x", _BASE),
        Invalid("x_flat", {"x": lambda x: x[0]}, "x", _BASE),
        Invalid("x_too_narrow", {"x": lambda x: x[:, 1:]}, "x", _BASE),
        Invalid("weight_of_int32", {"weight": lambda w: w.astype(np.int32)}, "weight", _BASE),
        Invalid("weight_stacked", {"weight": lambda w: w[None]}, "weight", _BASE),
        Invalid("head_of_the_vocabulary", {"weight": np.ones((8, 152064), np.int8)}, "weight", _BASE),
        Invalid("inner_too_large", {"weight": np.ones((65536, 4), np.int8)}, "weight", _BASE),
        Invalid("scale_too_short", {"antiquant_scale": lambda s: s[1:]}, "antiquant_scale", _BASE),
        Invalid("scale_of_other_dtype", {"antiquant_scale": np.ones(4, np.int32)}, "antiquant_scale", _BASE),
        Invalid("scale_per_group", {"antiquant_scale": np.ones((2, 4))}, "antiquant_scale", _BASE, only_on=PORTABLE),
        Invalid("bias_too_short", {"bias": lambda b: b[1:]}, "bias", _BASE),
        Invalid("bias_of_integers", {"bias": np.ones(4, np.int32)}, "bias", _BASE),
        Invalid("zero_point", {"antiquant_offset": np.ones(4)}, "antiquant_offset", _BASE, only_on=PORTABLE),
        Invalid("quantised_result", {"quant_scale": np.ones(4, np.float32)}, "quant_scale", _BASE),
        Invalid("offset_of_the_result", {"quant_offset": np.ones(4, np.float32)}, "quant_offset", _BASE),
        Invalid("groups", {"antiquant_group_size": 32}, "antiquant_group_size", _BASE, only_on=PORTABLE),
        Invalid("precision", {"inner_precise": 2}, "inner_precise", _BASE),
        Invalid("other_weights", {"weight_dtype": 1}, "weight_dtype", _BASE),
    ),
    skips=(
        Skip("bfloat16", "its bias is float32", "bias", (), ("bfloat16",)),
        Skip("float16", "its bias is float16", "wide_bias", (), ("float16",)),
        *(
            Skip("float32", "CANN's operator takes bfloat16 and float16", name, _DEVICES, ("float32",))
            for name in SAMPLES
        ),
    ),
)
