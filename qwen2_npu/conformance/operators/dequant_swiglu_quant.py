"""npu_dequant_swiglu_quant(x int32, weight_scale, activation_scale, activate_left, quant_mode=1) -> (y int8, scale).

    w = x · weight_scale · activation_scale, one per column and one per row, float32
    y, scale = rows of SwiGLU(w)

silu is taken of the first half with activate_left, else of the second.

Tolerance. w has a rounding for the conversion and one per scale, r = 3·u32. silu of a value within r has |w|·r more in
its exponent; ``swiglu`` has 8 u32. The sum: (8 + 3 + 3·(1 + |gate|))·u32, and silu's flushed values; then
``quantized.rows``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import quantized
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import U32

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    rows: int,
    width: int,
    left: bool = True,
    token: str = "flat",
    flat: bool = True,
    explicit: bool = False,
    magnitude: float = 1.0,
) -> Arguments:
    """``token``: '' for none, 'flat' for (rows,), 'column' for (rows, 1)."""
    weight_scale = rng.uniform(0.2, 2.0, 2 * width).astype(np.float32) / np.float32(1000)
    made: Arguments = {
        "x": (rng.standard_normal((rows, 2 * width)) * 2000 * magnitude).astype(np.int32),
        "weight_scale": weight_scale if flat else weight_scale[None],
        "activate_left": left,
        "quant_mode": 1,
    }
    if token:
        scale = rng.uniform(0.3, 2.0, rows).astype(np.float32)
        made["activation_scale"] = scale if token == "flat" else scale[:, None]
    return made | {"dst_type": 1, "round_mode": 0, "activate_dim": -1} if explicit else made


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    wide = arguments["x"] * arguments["weight_scale"].astype(np.float64).reshape(1, -1)
    if "activation_scale" in arguments:
        wide = wide * arguments["activation_scale"].astype(np.float64).reshape(-1, 1)
    left, right = np.split(wide, 2, -1)
    gate, up = (left, right) if arguments["activate_left"] else (right, left)
    exact = gate / (1.0 + np.exp(-gate)) * up
    slack = np.abs(exact) * (11 + 3 * (1 + np.abs(gate))) * U32
    return quantized.rows(exact, slack + quantized.FLUSHED * (1 + np.abs(gate)) * (1 + np.abs(up)))


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    sizes = {"rows": st.integers(1, 9), "width": st.integers(1, 70)}
    return st.fixed_dictionaries({**sizes, "left": st.booleans(), "token": st.sampled_from(["", "flat", "column"])})


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"rows": 4, "width": 64},
    "right": {"rows": 4, "width": 64, "left": False},
    "one_row": {"rows": 1, "width": 300},
    "no_activation_scale": {"rows": 3, "width": 33, "token": ""},
    "two_dimensional_scales": {"rows": 3, "width": 32, "token": "column", "flat": False},
    "explicit": {"rows": 3, "width": 32, "explicit": True},
    "saturating": {"rows": 3, "width": 32, "magnitude": 60.0},
}
_BASE: dict[str, Any] = {"rows": 3, "width": 4}

OPERATOR = OperatorRecord(
    name="npu_dequant_swiglu_quant",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("floats", {"x": np.ones((3, 8))}, "x", _BASE),
        Invalid("odd_width", {"x": lambda x: x[:, 1:]}, "x", _BASE),
        Invalid("flat", {"x": lambda x: x[0]}, "x", _BASE),
        Invalid("no_weight_scale", {"weight_scale": None}, "weight_scale", _BASE),
        Invalid("weight_scale_of_one_half", {"weight_scale": lambda s: s[:4]}, "weight_scale", _BASE),
        Invalid("activation_scale_too_short", {"activation_scale": lambda s: s[1:]}, "activation_scale", _BASE),
        Invalid("static", {"quant_mode": 0}, "quant_mode", _BASE),
        Invalid("int4", {"dst_type": 16}, "dst_type", _BASE),
        Invalid("downwards", {"round_mode": 2}, "round_mode", _BASE),
        Invalid("rows_halved", {"activate_dim": 0}, "activate_dim", _BASE),
        Invalid("clipped", {"swiglu_mode": 1}, "swiglu_mode", _BASE),
        Invalid("bias", {"bias": np.ones(8, np.float32)}, "bias", _BASE),
        Invalid("smoothed", {"quant_scale": np.ones(4, np.float32)}, "quant_scale", _BASE),
        Invalid("zero_point", {"quant_offset": np.ones(4, np.float32)}, "quant_offset", _BASE),
        Invalid("groups", {"group_index": np.array([3])}, "group_index", _BASE),
        *(Invalid(name, {name: 2.0}, name, _BASE) for name in ("clamp_limit", "glu_alpha", "glu_bias")),
    ),
)
