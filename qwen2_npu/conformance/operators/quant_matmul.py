"""npu_quant_matmul(x1, x2, scale, pertoken_scale, bias, output_dtype): int8 x1 @ x2 · scale · pertoken_scale + bias.

An int32 bias is added before the scales, others after. The sums are exact integers; an int32 result is these.

Tolerance. float32: the sum rounds once when it is converted, each scale multiplies with one rounding and the bias adds
with one: 3·u32 of the product and one of the result before the single rounding to the output's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import quantized
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import U32, rounded_band
from qwen2_npu.conformance.operators.tolerance import SECOND_ORDER

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FLOAT16, BFLOAT16, INT32 = 5, 15, 3
NAMES = {FLOAT16: "float16", BFLOAT16: "bfloat16", INT32: "int32"}


def build(
    rng: np.random.Generator,
    rows: int,
    inner: int,
    columns: int,
    output_dtype: int = BFLOAT16,
    token: bool = True,
    bias: str = "",
    batch: int = 0,
    one_scale: bool = False,
    largest: bool = False,
) -> Arguments:
    """``largest``: every product is 127², of either sign in a column: sums that float32 does not hold."""
    lead = (batch,) if batch else ()
    made: Arguments = {
        "x1": quantized.int8(rng, *lead, rows, inner),
        "x2": quantized.int8(rng, inner, columns),
        "scale": (rng.uniform(0.2, 5.0, 1 if one_scale else columns) / (5000 * np.sqrt(inner))).astype(np.float32),
        "output_dtype": output_dtype,
    }
    if largest:
        made["x1"][:], made["x2"][:] = 127, np.where(np.arange(columns) % 2, -127, 127)
    if token:
        made["pertoken_scale"] = rng.uniform(0.2, 5.0, rows).astype(np.float32)
    if bias:
        values = rng.standard_normal(columns) * (5000 * np.sqrt(inner) if bias == "int32" else 3.0)
        made["bias"] = values.astype(bias)
    return made


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    sums = arguments["x1"].astype(np.float64) @ arguments["x2"].astype(np.float64)
    bias = arguments.get("bias", np.zeros(1, np.float32))
    if bias.dtype == np.int32:
        sums, bias = sums + bias, np.zeros(1)
    if arguments["output_dtype"] == INT32:
        return (Expected("y", sums, np.zeros_like(sums), dtype="int32"),)
    scaled = sums * arguments["scale"].astype(np.float64)
    if "pertoken_scale" in arguments:
        scaled = scaled * arguments["pertoken_scale"].astype(np.float64)[:, None]
    slack = SECOND_ORDER * U32 * (3 * np.abs(scaled) + np.abs(scaled + bias))
    name = NAMES[arguments["output_dtype"]]
    return (Expected("y", *rounded_band(scaled + bias, slack, name), dtype=name),)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    sizes = {"rows": st.integers(1, 9), "inner": st.integers(1, 70), "columns": st.integers(1, 40)}
    scaled = {"token": st.booleans(), "output_dtype": st.sampled_from([FLOAT16, BFLOAT16])}
    integers = {"token": st.just(False), "output_dtype": st.just(INT32), "bias": st.sampled_from(["", "int32"])}
    return st.one_of(*(st.fixed_dictionaries({**sizes, **kind}) for kind in (scaled, integers)))


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"rows": 4, "inner": 64, "columns": 48},
    "half": {"rows": 4, "inner": 64, "columns": 48, "output_dtype": FLOAT16, "bias": "float32"},
    "one_row": {"rows": 1, "inner": 896, "columns": 33},
    "many_rows": {"rows": 33, "inner": 67, "columns": 35},
    "no_token_scale": {"rows": 4, "inner": 64, "columns": 48, "token": False},
    "integer_bias": {"rows": 4, "inner": 64, "columns": 48, "bias": "int32"},
    "float_bias": {"rows": 4, "inner": 64, "columns": 48, "bias": "float32"},
    "three_dimensional": {"rows": 4, "inner": 64, "columns": 48, "batch": 2},
    "integers": {"rows": 4, "inner": 896, "columns": 48, "output_dtype": INT32, "token": False},
    "integers_with_bias": {
        "rows": 3,
        "inner": 64,
        "columns": 48,
        "output_dtype": INT32,
        "token": False,
        "bias": "int32",
    },
    "largest_integers": {
        "rows": 1,
        "inner": 65535,
        "columns": 2,
        "output_dtype": INT32,
        "token": False,
        "largest": True,
    },
    "one_scale": {"rows": 4, "inner": 64, "columns": 48, "one_scale": True},
}
PORTABLE = ("cpu", "cuda")
"""What the device takes and the portable kernels leave out is refused there alone."""
_BASE: dict[str, Any] = {"rows": 3, "inner": 8, "columns": 4, "bias": "float32"}
_NUMBERS = ("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype")

OPERATOR = OperatorRecord(
    name="npu_quant_matmul",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("x1_of_floats", {"x1": np.ones((3, 8))}, "x1", _BASE),
        Invalid("x1_flat", {"x1": lambda x: x[0]}, "x1", _BASE),
        Invalid("x1_too_narrow", {"x1": lambda x: x[:, 1:]}, "x1", _BASE),
        Invalid("x2_of_floats", {"x2": np.ones((8, 4))}, "x2", _BASE),
        Invalid("head_of_the_vocabulary", {"x2": np.ones((8, 152064), np.int8)}, "x2", _BASE),
        Invalid("inner_too_large", {"x2": np.ones((65536, 4), np.int8)}, "x2", _BASE),
        Invalid("scale_too_short", {"scale": lambda s: s[1:]}, "scale", _BASE),
        Invalid("scale_of_integers", {"scale": np.ones(4, np.int64)}, "scale", _BASE),
        Invalid("token_scale_per_column", {"pertoken_scale": np.ones(4, np.float32)}, "pertoken_scale", _BASE),
        Invalid("bias_too_short", {"bias": lambda b: b[1:]}, "bias", _BASE),
        Invalid("bias_of_int64", {"bias": np.ones(4, np.int64)}, "bias", _BASE),
        Invalid("default_result", {"output_dtype": None}, "output_dtype", _BASE, only_on=PORTABLE),
        Invalid("float32_result", {"output_dtype": 6}, "output_dtype", _BASE, only_on=PORTABLE),
        Invalid("float_bias_of_integers", {"output_dtype": INT32, "pertoken_scale": None}, "bias", _BASE),
        Invalid(
            "token_scale_of_integers", {"output_dtype": INT32, "bias": None}, "pertoken_scale", _BASE, only_on=PORTABLE
        ),
        Invalid("scale_of_integers_left_out", {"output_dtype": INT32, "scale": np.ones(3)}, "scale", _BASE),
        Invalid("offset", {"offset": np.ones(4, np.float32)}, "offset", _BASE, only_on=PORTABLE),
        Invalid("scale_of_the_result", {"y_scale": np.ones(4, np.float32)}, "y_scale", _BASE),
        Invalid("groups", {"group_sizes": [1, 1, 32]}, "group_sizes", _BASE),
        *(Invalid(name, {name: 1}, name, _BASE) for name in _NUMBERS),
    ),
)
