"""npu_apply_rotary_pos_emb(query, key, cos, sin, layout='BSND', rotary_mode='half') -> (query, key), rotated.

Shapes: query (B,S,Nq,D), key (B,S,Nk,D), cos and sin (B,S,1,D), all of one dtype. Eager execution overwrites
query and key and returns them, although the schema declares no alias; under torch.compile the operator is out
of place. Formula and tolerance are ``rotary_mul``'s.
"""

# ruff: noqa: N803  (dimensions are spelled as in the documentation)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rotary_mul import angles, rotate

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    B: int = 1,
    S: int = 1,
    Nq: int = 2,
    Nk: int = 2,
    D: int = 128,
    free: bool = False,
    layout: str | None = None,
    rotary_mode: str | None = None,
) -> Arguments:
    """``free`` fills cos and sin with unrelated numbers, so that their halves differ."""
    if free:
        cos, sin = rng.standard_normal((B, S, 1, D)), rng.standard_normal((B, S, 1, D))
    else:
        cos, sin = (table.reshape(B, S, 1, D) for table in angles(rng, B * S, D))
    arguments = {
        "query": rng.standard_normal((B, S, Nq, D)),
        "key": rng.standard_normal((B, S, Nk, D)),
        "cos": cos,
        "sin": sin,
    }
    options = {"layout": layout, "rotary_mode": rotary_mode}
    return arguments | {name: value for name, value in options.items() if value is not None}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    return tuple(rotate(name, arguments[name], arguments["cos"], arguments["sin"], dtype) for name in ("query", "key"))


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.fixed_dictionaries(
        {
            "B": st.integers(1, 3),
            "S": st.integers(1, 9),
            "Nq": st.integers(1, 8),
            "Nk": st.integers(1, 4),
            "free": st.booleans(),
        }
    )


SAMPLES: dict[str, dict[str, Any]] = {
    "prefill": {"B": 2, "S": 9, "Nq": 12, "Nk": 2},
    "decode": {"B": 3, "S": 1, "Nq": 28, "Nk": 4},
    "one_of_everything": {"B": 1, "S": 1, "Nq": 1, "Nk": 1},
    "no_grouping": {"B": 2, "S": 5, "Nq": 8, "Nk": 8},
    "different_halves": {"B": 2, "S": 5, "Nq": 4, "Nk": 2, "free": True},
    "explicit_layout": {"B": 1, "S": 3, "Nq": 4, "Nk": 2, "layout": "BSND", "rotary_mode": "half"},
}

_BASE: dict[str, Any] = {"B": 2, "S": 3, "Nq": 4, "Nk": 2}

OPERATOR = OperatorRecord(
    name="npu_apply_rotary_pos_emb",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("layout_BNSD", {"layout": "BNSD"}, "layout", _BASE),
        Invalid("layout_SBND", {"layout": "SBND"}, "layout", _BASE),
        Invalid("mode_interleave", {"rotary_mode": "interleave"}, "rotary_mode", _BASE),
        Invalid("key_of_other_width", {"key": lambda key: key[..., :64]}, "key", _BASE),
        Invalid("key_of_other_length", {"key": lambda key: key[:, :2]}, "key", _BASE),
        Invalid("key_of_other_dtype", {"key": np.ones((2, 3, 2, 128), np.int32)}, "key", _BASE),
        Invalid("cos_of_other_width", {"cos": lambda cos: cos[..., :64]}, "cos", _BASE),
        Invalid("cos_of_other_length", {"cos": lambda cos: cos[:, :2]}, "cos", _BASE),
        Invalid("sin_of_other_length", {"sin": lambda sin: sin[:, :2]}, "sin", _BASE),
        Invalid("sin_of_other_dtype", {"sin": np.ones((2, 3, 1, 128), np.int32)}, "sin", _BASE),
        Invalid("width_96", {}, "query", {**_BASE, "D": 96}),
    ),
    writes=("query", "key"),
    skips=(
        Skip(
            "head_dim 64",
            "documented, yet the tiling of 2025-11 fails unless it is 128: callers use npu_rotary_mul",
        ),
    ),
)
