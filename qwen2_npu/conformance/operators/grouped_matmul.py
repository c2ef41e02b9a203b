"""npu_grouped_matmul(x, weight, bias, group_list, …): y_i = x_i @ weight_i + bias_i for every group i.

Either every group has its own x, or one x is divided by group_list into groups of rows: where they end
(group_list_type 0) or how many there are (1). The results come as one tensor per group (split_item 0, 1) or as one for
all (2, 3).

Tolerance. float32 sums K products and the bias, each product exact for bfloat16 and float16 and rounded once for
float32: |error| <= (K + 1)·u32·(|x|·|weight| + |bias|). The result is the rounding of a value within that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import U32, FloatArray, rounded_band
from qwen2_npu.conformance.operators.tolerance import SECOND_ORDER

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    sizes: Sequence[int],
    inner: int,
    columns: int,
    ends: bool = False,
    listed: str = "",
    whole: bool = True,
    bias: str = "",
    magnitude: float = 1.0,
    tuned: bool = False,
) -> Arguments:
    """``listed``: '', 'weights' or 'both', what is one tensor per group. ``bias``: the dtype that has one: 'float32',
    or 'dtype' for that under test.
    """
    groups, rows = len(sizes), sum(sizes)
    x = rng.standard_normal((rows, inner)) * magnitude
    weight = rng.standard_normal((groups, inner, columns)) / np.sqrt(inner)
    made: Arguments = {"x": [x], "weight": [weight], "split_item": 2 if whole else 0, "group_type": 0}
    if bias:
        addends = rng.standard_normal((groups, columns)) * magnitude
        made["bias"] = [addends.astype(np.float32) if bias == "float32" else addends]
    if listed:
        made |= {name: list(made[name][0]) for name in ("weight", "bias") if name in made}
    if listed == "both":
        return made | {"x": np.split(x, np.cumsum(sizes)[:-1]), "group_type": 0 if whole else -1}
    made |= {"group_list": np.cumsum(sizes) if ends else np.array(sizes, np.int64), "group_list_type": int(not ends)}
    return made | {"tuning_config": [rows // groups]} if tuned else made


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    x, weights, biases = arguments["x"], arguments["weight"], arguments.get("bias")
    if len(weights) == 1 and weights[0].ndim == 3:
        weights, biases = list(weights[0]), None if biases is None else list(biases[0])
    if "group_list" in arguments:
        numbers = arguments["group_list"]
        ends = np.cumsum(numbers) if arguments["group_list_type"] == 1 else numbers
        x = np.split(x[0], ends[:-1])
    addends = [0.0] * len(weights) if biases is None else [bias.astype(np.float64) for bias in biases]
    made = [_product(*operands, dtype) for operands in zip(x, weights, addends, strict=True)]
    if arguments["split_item"] in (2, 3):
        made = [(np.concatenate([value for value, _ in made]), np.concatenate([bound for _, bound in made]))]
    return tuple(Expected(f"y{index}", value, bound) for index, (value, bound) in enumerate(made))


def _product(x: FloatArray, weight: FloatArray, bias: Any, dtype: str) -> tuple[FloatArray, FloatArray]:
    size = np.abs(x) @ np.abs(weight) + np.abs(bias)
    return rounded_band(x @ weight + bias, SECOND_ORDER * (x.shape[-1] + 1) * U32 * size, dtype)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.fixed_dictionaries(
        {
            "sizes": st.lists(st.sampled_from([0, 0, 1, 2, 7]), min_size=2, max_size=9).filter(any),
            "inner": st.integers(1, 70),
            "columns": st.integers(1, 40),
            "ends": st.booleans(),
            "magnitude": st.sampled_from([1e-3, 1.0, 40.0]),
        }
    )


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"sizes": [3, 0, 5, 1], "inner": 64, "columns": 48},
    "ends": {"sizes": [3, 0, 5, 1], "inner": 64, "columns": 48, "ends": True},
    "eight_of_many": {"sizes": [0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1], "inner": 40, "columns": 24},
    "all_on_the_first": {"sizes": [7, 0, 0], "inner": 32, "columns": 16},
    "all_on_the_last": {"sizes": [0, 0, 7], "inner": 32, "columns": 16, "ends": True},
    "one_row": {"sizes": [0, 1], "inner": 96, "columns": 33},
    "one_group": {"sizes": [5], "inner": 33, "columns": 17, "ends": True},
    "wide_bias": {"sizes": [3, 0, 5], "inner": 96, "columns": 33, "bias": "float32"},
    "bias": {"sizes": [3, 0, 5], "inner": 96, "columns": 33, "bias": "dtype"},
    "weights_as_list": {"sizes": [3, 0, 5], "inner": 32, "columns": 16, "listed": "weights"},
    "weights_and_bias_as_lists": {"sizes": [3, 2], "inner": 32, "columns": 16, "listed": "weights", "bias": "float32"},
    "lists": {"sizes": [3, 1, 5], "inner": 32, "columns": 16, "listed": "both", "whole": False},
    "lists_to_one": {"sizes": [3, 1, 5], "inner": 32, "columns": 16, "listed": "both"},
    "tuned": {"sizes": [3, 0, 5], "inner": 32, "columns": 16, "tuned": True},
    "inner_one": {"sizes": [2, 3], "inner": 1, "columns": 5},
    "large": {"sizes": [2, 3], "inner": 64, "columns": 16, "magnitude": 1e3},
    "tiny": {"sizes": [2, 3], "inner": 64, "columns": 16, "magnitude": 1e-3},
}

_BASE: dict[str, Any] = {"sizes": [2, 0, 3], "inner": 8, "columns": 4, "bias": "float32"}
_LISTS: dict[str, Any] = {"sizes": [2, 1, 3], "inner": 8, "columns": 4, "listed": "both"}

_TENSORS = ("scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale", "activation_input",
            "activation_quant_scale", "activation_quant_offset")  # fmt: skip
_NUMBERS = ("output_dtype", "x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype", "act_type")
_WIDE_BIAS = tuple(name for name, parameters in SAMPLES.items() if parameters.get("bias") == "float32")
_LISTED = tuple(name for name, parameters in SAMPLES.items() if parameters.get("listed"))
_DEVICES = ("npu", "emulated")

OPERATOR = OperatorRecord(
    name="npu_grouped_matmul",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("no_x", {"x": []}, "x", _BASE),
        Invalid("x_of_integers", {"x": [np.ones((5, 8), np.int8)]}, "x", _BASE),
        Invalid("x_flat", {"x": lambda x: [x[0][0]]}, "x", _BASE),
        Invalid("x_too_narrow", {"x": lambda x: [x[0][:, 1:]]}, "x", _BASE),
        Invalid("x_stacked", {"x": lambda x: [x[0][None]]}, "x", _BASE),
        Invalid("x_too_wide", {"x": [np.ones((5, 65536))]}, "x", _BASE),
        Invalid("too_few_x", {"x": lambda x: x[:-1]}, "x", _LISTS),
        Invalid("weight_of_other_dtype", {"weight": [np.ones((3, 8, 4), np.int8)]}, "weight", _BASE),
        Invalid("weight_flat", {"weight": [np.ones(8)]}, "weight", _BASE),
        Invalid("weight_of_four_dimensions", {"weight": lambda w: [w[0][None]]}, "weight", _BASE),
        Invalid("weight_stacked_in_a_list", {"weight": lambda w: [w[0], w[0]]}, "weight", _BASE),
        Invalid("weights_of_other_widths", {"weight": lambda w: [w[0], w[1], w[2][:, 1:]]}, "weight", _LISTS),
        Invalid("bias_too_narrow", {"bias": lambda b: [b[0][:, 1:]]}, "bias", _BASE),
        Invalid("bias_flat", {"bias": lambda b: [b[0][0]]}, "bias", _BASE),
        Invalid("bias_of_other_dtype", {"bias": lambda b: [b[0].astype(np.int32)]}, "bias", _BASE),
        Invalid("group_list_too_short", {"group_list": lambda g: g[1:]}, "group_list", _BASE),
        Invalid("group_list_as_int32", {"group_list": lambda g: g.astype(np.int32)}, "group_list", _BASE),
        Invalid("group_list_missing", {"group_list": None}, "group_list", _BASE),
        Invalid("group_list_of_lists", {"group_list": np.array([2, 1, 3])}, "group_list", _LISTS),
        Invalid("sizes_as_ends", {"group_list_type": 0}, "group_list", _BASE),
        Invalid("sizes_of_fewer_rows", {"group_list": lambda g: g - g.max() // 3}, "group_list", _BASE),
        Invalid("pairs", {"group_list_type": 2}, "group_list_type", _BASE),
        Invalid("no_such_split", {"split_item": 4}, "split_item", _BASE),
        Invalid("columns_divided", {"group_type": 2}, "group_type", _BASE),
        Invalid("not_divided", {"group_type": -1}, "group_type", _BASE),
        *(Invalid(name, {name: [np.ones(4)]}, name, _BASE) for name in _TENSORS),
        *(Invalid(name, {name: 1}, name, _BASE) for name in _NUMBERS),
    ),
    skips=(
        Skip("bfloat16", "its bias is float32", "bias", (), ("bfloat16",)),
        *(Skip("float16", "its bias is float16", name, (), ("float16",)) for name in _WIDE_BIAS),
        *(Skip("float32", "CANN takes single tensors only", name, _DEVICES, ("float32",)) for name in _LISTED),
    ),
)
