"""scatter_update(_)(input, indices, updates, axis): one slice start per batch row; the KV-cache write.

    input[i, …, indices[i]+k, …] = updates[i, …, k, …]      along ``axis``, for every i < len(indices)

Shapes: input (B, …), indices (n) int32 or int64 with n <= B, updates (n, …) equal to input's but along
``axis``. ``scatter_update_`` writes its input and returns it; ``scatter_update`` returns a new tensor.
Nothing is computed, so the tolerance is zero, on the slots that stay as they were, too. The device checks no
bounds; eager kernels on a CPU raise IndexError before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    shape: Sequence[int],
    axis: int,
    indices: Sequence[int],
    length: int = 1,
    index_dtype: str = "int64",
) -> Arguments:
    """``length`` is the number of slots written per row."""
    written = [len(indices), *shape[1:]]
    written[axis] = length
    return {
        "input": rng.standard_normal(shape),
        "indices": np.asarray(indices, dtype=index_dtype),
        "updates": rng.standard_normal(written),
        "axis": axis,
    }


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    out, axis = arguments["input"].copy(), arguments["axis"]
    for row, start in enumerate(arguments["indices"]):
        target = np.moveaxis(out[row : row + 1], axis, 0)
        source = np.moveaxis(arguments["updates"][row : row + 1], axis, 0)
        target[start : start + len(source)] = source
    return (Expected("out", out, np.zeros_like(out)),)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    @st.composite
    def parameters(draw: st.DrawFn) -> dict[str, Any]:
        shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
        axis = draw(st.sampled_from([*range(1, len(shape)), *range(1 - len(shape), 0)]))
        length = draw(st.integers(1, shape[axis]))
        starts = st.integers(0, shape[axis] - length)
        return {
            "shape": shape,
            "axis": axis,
            "indices": draw(st.lists(starts, min_size=1, max_size=shape[0])),
            "length": length,
            "index_dtype": draw(st.sampled_from(["int32", "int64"])),
        }

    return parameters()


SAMPLES: dict[str, dict[str, Any]] = {
    "BNSD_decode": {"shape": [3, 2, 16, 64], "axis": -2, "indices": [5, 0, 15]},
    "BNSD_prefill": {"shape": [2, 2, 16, 64], "axis": 2, "indices": [0, 0], "length": 9},
    "BSND_decode": {"shape": [3, 16, 2, 64], "axis": 1, "indices": [5, 0, 15]},
    "BSND_prefill": {"shape": [2, 16, 2, 64], "axis": -3, "indices": [0, 0], "length": 9},
    "BSH": {"shape": [2, 16, 128], "axis": 1, "indices": [3, 7], "length": 4},
    "int32_indices": {"shape": [2, 16, 2, 64], "axis": 1, "indices": [3, 7], "index_dtype": "int32"},
    "to_the_end": {"shape": [2, 16, 2, 64], "axis": 1, "indices": [12, 0], "length": 4},
    "whole_axis": {"shape": [2, 7, 2, 32], "axis": 1, "indices": [0, 0], "length": 7},
    "fewer_rows": {"shape": [4, 8, 2, 32], "axis": 1, "indices": [2, 5]},
    "last_axis": {"shape": [3, 2, 20], "axis": -1, "indices": [0, 10, 17], "length": 3},
    "two_dimensional": {"shape": [3, 9], "axis": 1, "indices": [8, 4, 0]},
    "overlapping_starts": {"shape": [3, 10, 1, 8], "axis": 1, "indices": [4, 4, 5], "length": 3},
}

_BASE: dict[str, Any] = {"shape": [2, 16, 2, 64], "axis": 1, "indices": [3, 7], "length": 2}

INVALID = (
    Invalid("axis_zero", {"axis": 0}, "axis", _BASE),
    Invalid("axis_negative_zero", {"axis": -4}, "axis", _BASE),
    Invalid("axis_too_large", {"axis": 4}, "axis", _BASE),
    Invalid("two_dimensional_indices", {"indices": np.array([[3], [7]])}, "indices", _BASE),
    Invalid("indices_of_floats", {"indices": np.array([3.0, 7.0], np.float32)}, "indices", _BASE),
    Invalid("more_indices_than_rows", {"indices": np.array([1, 2, 3])}, "indices", _BASE),
    Invalid("updates_of_other_dtype", {"updates": np.ones((2, 2, 2, 64), np.int32)}, "updates", _BASE),
    Invalid("updates_of_other_rank", {"updates": lambda updates: updates[0]}, "updates", _BASE),
    Invalid("updates_of_other_width", {"updates": lambda updates: updates[..., :32]}, "updates", _BASE),
    Invalid("updates_of_one_row", {"updates": lambda updates: updates[:1]}, "updates|indices", _BASE),
    Invalid("past_the_end", {"indices": np.array([3, 15])}, "indices", _BASE, IndexError, only_on=("cpu",)),
    Invalid(
        "far_past_the_end",
        {"indices": np.array([3, 1 << 20])},
        "indices",
        _BASE,
        IndexError,
        only_on=("cpu",),
    ),
    Invalid("negative_index", {"indices": np.array([-1, 3])}, "indices", _BASE, IndexError, only_on=("cpu",)),
)


OUT_OF_PLACE = OperatorRecord(
    name="scatter_update",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=INVALID,
)
IN_PLACE = replace(OUT_OF_PLACE, name="scatter_update_", writes=("input",), graph_writes=("input",))
