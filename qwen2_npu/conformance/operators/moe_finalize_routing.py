"""npu_moe_finalize_routing: out[i] = skip1[i] + skip2[i] + Σ_j scales[i, j]·(rows[place(i, j)] + bias[expert(i, j)]).

place(i, j) stands in expanded_src_to_dst_row at j·N + i (drop_pad_mode 0, the order of npu_moe_init_routing) or at
i·k + j (2, that of npu_moe_init_routing_v2). Without scales there is one copy of a row, which counts 1.

Tolerance. A term takes one addition and one product, and the sum of k + 2 terms at most k + 1 additions: |error| <=
(k + 3)·u·A with A = |skip1| + |skip2| + Σ|scale|·(|row| + |bias|). bfloat16 is computed in float32 (u = u32) and
rounded once. CANN's kernel computes float32 and float16 in the dtype itself: u is its own, and every rounding of a
subnormal may lose ``tiny``: (2k + 2) of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import FORMATS, U32, rounded_band
from qwen2_npu.conformance.operators.tolerance import SECOND_ORDER

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    rows: int,
    width: int,
    k: int,
    scales: str = "given",
    skips: int = 0,
    experts: int = 0,
    by_row: bool = True,
    magnitude: float = 1.0,
    told_k: bool = False,
) -> Arguments:
    """``scales``: 'given', 'wide' (float32 whatever the dtype) or 'none'. ``experts``: with a bias for so many."""
    made: Arguments = {
        "expanded_permuted_rows": rng.standard_normal((rows * k, width)) * magnitude,
        "skip1": rng.standard_normal((rows, width)) * magnitude if skips else None,
        "skip2": rng.standard_normal((rows, width)) * magnitude if skips > 1 else None,
        "bias": rng.standard_normal((experts, width)) * magnitude if experts else None,
        "scales": rng.random((rows, k)),
        "expanded_src_to_dst_row": rng.permutation(rows * k).astype(np.int32),
        "export_for_source_row": rng.integers(0, experts, (rows, k)).astype(np.int32) if experts else None,
        "drop_pad_mode": 2 if by_row else 0,
    }
    if scales == "wide":
        made["scales"] = made["scales"].astype(np.float32)
    if scales == "none":
        made["scales"] = None
    return made | {"k": k} if told_k else made


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    expanded, scales, index = (
        arguments[name] for name in ("expanded_permuted_rows", "scales", "expanded_src_to_dst_row")
    )
    k = 1 if scales is None else scales.shape[1]
    rows = len(index) // k
    places = index.reshape(rows, k) if arguments.get("drop_pad_mode", 0) == 2 else index.reshape(k, rows).T
    weights = np.ones((rows, k, 1)) if scales is None else scales.astype(np.float64)[..., None]
    parts = expanded[places]
    sizes = np.abs(parts)
    if arguments["bias"] is not None:
        parts = parts + arguments["bias"][arguments["export_for_source_row"]]
        sizes = sizes + np.abs(arguments["bias"][arguments["export_for_source_row"]])
    skips = [arguments[name] for name in ("skip1", "skip2") if arguments[name] is not None]
    exact = (weights * parts).sum(1) + sum(skips)
    size = (np.abs(weights) * sizes).sum(1) + sum(np.abs(skip) for skip in skips)
    if dtype == "float16":
        form = FORMATS[dtype]
        slack = SECOND_ORDER * ((k + 3) * form.unit * size + (2 * k + 2) * form.tiny)
    else:
        slack = SECOND_ORDER * (k + 3) * U32 * size
    return (Expected("out", *rounded_band(exact, slack, dtype)),)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.fixed_dictionaries(
        {
            "rows": st.integers(1, 9),
            "width": st.integers(1, 40),
            "k": st.integers(1, 9),
            "skips": st.integers(0, 2),
            "experts": st.sampled_from([0, 1, 7]),
            "by_row": st.booleans(),
            "magnitude": st.sampled_from([1e-3, 1.0, 40.0]),
        }
    )


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"rows": 5, "width": 64, "k": 8},
    "one_row": {"rows": 1, "width": 64, "k": 8},
    "shared_expert": {"rows": 5, "width": 48, "k": 8, "skips": 1},
    "two_skips": {"rows": 5, "width": 33, "k": 3, "skips": 2},
    "bias": {"rows": 4, "width": 24, "k": 3, "experts": 7},
    "everything": {"rows": 4, "width": 24, "k": 3, "skips": 2, "experts": 7},
    "by_column": {"rows": 5, "width": 24, "k": 4, "by_row": False},
    "everything_by_column": {"rows": 5, "width": 24, "k": 4, "skips": 2, "experts": 9, "by_row": False},
    "one_skip_by_column": {"rows": 5, "width": 24, "k": 4, "skips": 1, "experts": 9, "by_row": False},
    "wide_scales": {"rows": 5, "width": 64, "k": 8, "skips": 1, "scales": "wide"},
    "no_scales": {"rows": 5, "width": 24, "k": 1, "scales": "none"},
    "no_scales_but_bias": {"rows": 5, "width": 24, "k": 1, "skips": 1, "experts": 3, "scales": "none"},
    "told_k": {"rows": 5, "width": 24, "k": 4, "told_k": True},
    "one_expert": {"rows": 3, "width": 5, "k": 1, "skips": 1},
    "large": {"rows": 3, "width": 40, "k": 4, "skips": 1, "magnitude": 1e3},
    "tiny": {"rows": 3, "width": 40, "k": 4, "skips": 1, "magnitude": 1e-3},
}

_BASE: dict[str, Any] = {"rows": 3, "width": 4, "k": 2, "skips": 2, "experts": 5}
_ROWS, _INDEX, _EXPERTS = "expanded_permuted_rows", "expanded_src_to_dst_row", "export_for_source_row"
_WRONG_PLACES = {_INDEX: lambda index: index - 1}

OPERATOR = OperatorRecord(
    name="npu_moe_finalize_routing",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("rows_stacked", {_ROWS: lambda x: x[None]}, _ROWS, _BASE),
        Invalid("rows_of_integers", {_ROWS: np.ones((6, 4), np.int8)}, _ROWS, _BASE),
        Invalid("skip1_too_long", {"skip1": lambda x: np.concatenate([x, x])}, "skip1", _BASE),
        Invalid("skip1_of_other_dtype", {"skip1": np.ones((3, 4), np.int32)}, "skip1", _BASE),
        Invalid("skip2_too_narrow", {"skip2": lambda x: x[:, 1:]}, "skip2", _BASE),
        Invalid("skip2_alone", {"skip1": None}, "skip2", _BASE),
        Invalid("bias_too_narrow", {"bias": lambda x: x[:, 1:]}, "bias", _BASE),
        Invalid("bias_of_other_dtype", {"bias": np.ones((5, 4), np.int32)}, "bias", _BASE),
        Invalid("bias_without_experts", {_EXPERTS: None}, _EXPERTS, _BASE),
        Invalid("experts_flat", {_EXPERTS: lambda e: e.reshape(-1)}, _EXPERTS, _BASE),
        Invalid("experts_as_int64", {_EXPERTS: lambda e: e.astype(np.int64)}, _EXPERTS, _BASE),
        Invalid(
            "expert_too_large",
            {_EXPERTS: lambda e: e + 5},
            _EXPERTS,
            _BASE,
            only_on=("cpu",),
        ),
        Invalid("scales_flat", {"scales": lambda x: x.reshape(-1)}, "scales", _BASE),
        Invalid("scales_of_fewer_rows", {"scales": lambda x: x[1:]}, "scales", _BASE),
        Invalid("scales_of_other_dtype", {"scales": np.ones((3, 2), np.int32)}, "scales", _BASE),
        Invalid("index_of_fewer_rows", {_INDEX: lambda x: x[1:]}, _INDEX, _BASE),
        Invalid("index_as_matrix", {_INDEX: lambda x: x.reshape(3, 2)}, _INDEX, _BASE),
        Invalid(
            "index_as_int64",
            {_INDEX: lambda x: x.astype(np.int64)},
            _INDEX,
            _BASE,
        ),
        Invalid("place_negative", _WRONG_PLACES, _INDEX, _BASE, only_on=("cpu",)),
        Invalid("padded", {"drop_pad_mode": 1}, "drop_pad_mode", _BASE),
        Invalid("padded_by_row", {"drop_pad_mode": 3}, "drop_pad_mode", _BASE),
        Invalid("several_copies_without_scales", {"scales": None, "k": 2}, "k", _BASE),
        Invalid("no_copies_without_scales", {"scales": None, "k": 0}, "k", _BASE),
    ),
    skips=(Skip("float16", "CANN takes float32 scales beside bfloat16 alone", "wide_scales", (), ("float16",)),),
)
