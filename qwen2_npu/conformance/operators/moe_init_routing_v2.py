"""npu_moe_init_routing_v2(x, expert_idx, …): a copy of each row for each of its experts, in the order of the experts.

The copies are sorted by expert and stay in their order within one: copy i·k + j, of row i for its j-th expert, comes
before every later one for the same expert. expanded_row_idx: of type 0 where each copy went, of type 1 which copy came
to each place. With active_expert_range = (first, end) the copies for other experts come after all active ones; they
have the index -1 (type 0) or none that is defined (type 1), and their values are undefined. expert number E belongs to
no expert: rows that the gating calls finished.

The fourth output is a scale that belongs to quantisation: undefined without one. All others are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample
from qwen2_npu.conformance.operators.rounding import Array

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(
    rng: np.random.Generator,
    rows: int,
    width: int,
    k: int,
    experts: int,
    count: bool = True,
    chosen: str = "different",
    active: Sequence[int] | str = "all",
    active_num: str | None = "all",
    row_idx_type: int | None = None,
) -> Arguments:
    """``chosen``: every row's experts are 'different' ones, the 'first' k, all the 'same', or 'finished' in part."""
    by_row = np.argsort(rng.random((rows, experts)), -1)[:, :k] if rows else np.zeros((0, k))
    if chosen == "first":
        by_row = np.broadcast_to(np.arange(k), (rows, k))
    if chosen == "same":
        by_row = np.full((rows, k), experts // 2)
    if chosen == "finished":
        by_row = np.where(np.arange(rows)[:, None] % 2, experts, by_row)
    made: Arguments = {
        "x": rng.standard_normal((rows, width)),
        "expert_idx": by_row.astype(np.int32),
        "expert_num": experts,
        "expert_tokens_num_type": int(count),
        "expert_tokens_num_flag": True,
    }
    if active_num is not None:
        made["active_num"] = rows * k if active_num == "all" else 0
    if active != "default":
        made["active_expert_range"] = [0, experts] if active == "all" else list(active)
    return made if row_idx_type is None else made | {"row_idx_type": row_idx_type}


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    x, flat = arguments["x"], arguments["expert_idx"].reshape(-1)
    copies, k = len(flat), arguments["expert_idx"].shape[1]
    first, end = arguments.get("active_expert_range") or (0, arguments["expert_num"])
    groups = [np.flatnonzero(flat == expert) for expert in range(first, end)]
    order = np.concatenate(groups).astype(int)
    defined = np.arange(copies) < len(order)
    source = np.concatenate([order, np.zeros(copies - len(order), int)])
    expanded = x[source // k] if copies else np.zeros((0, x.shape[1]))
    gathered = np.full(copies, -1)
    gathered[order] = np.arange(len(order))
    scattered = arguments.get("row_idx_type", 0) == 1
    counts = np.array([len(group) for group in groups])
    tokens = counts if arguments["expert_tokens_num_type"] == 1 else np.cumsum(counts)
    return (
        Expected("expanded_x", expanded, np.zeros(expanded.shape), defined[:, None]),
        _exact("expanded_row_idx", source if scattered else gathered, defined if scattered else None, "int32"),
        _exact("expert_token_cumsum_or_count", tokens, None, "int64"),
        Expected("expanded_scale", None, dtype="float32"),
    )


def _exact(name: str, value: Array, defined: Array | None, dtype: str) -> Expected:
    return Expected(name, value.astype(np.float64), np.zeros(value.shape), defined, dtype)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    def fitted(made: tuple[int, int, dict[str, Any], int, int]) -> dict[str, Any]:
        experts, k, rest, first, size = made
        first %= experts
        active = [first, first + 1 + size % (experts - first)] if size else "all"
        return {"experts": experts, "k": k % experts + 1, "active": active, **rest}

    rest = st.fixed_dictionaries(
        {
            "rows": st.integers(1, 12),
            "width": st.integers(1, 40),
            "count": st.booleans(),
            "chosen": st.sampled_from(["different", "first", "same", "finished"]),
            "row_idx_type": st.sampled_from([0, 1]),
        }
    )
    return st.tuples(st.integers(1, 20), st.integers(0, 20), rest, st.integers(0, 20), st.integers(0, 20)).map(fitted)


SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"rows": 5, "width": 48, "k": 8, "experts": 64},
    "one_row": {"rows": 1, "width": 48, "k": 8, "experts": 64},
    "many_rows": {"rows": 37, "width": 6, "k": 4, "experts": 9},
    "ends": {"rows": 6, "width": 8, "k": 3, "experts": 10, "count": False},
    "all_on_the_first_experts": {"rows": 6, "width": 8, "k": 2, "experts": 16, "chosen": "first"},
    "all_on_one_expert": {"rows": 6, "width": 8, "k": 2, "experts": 16, "chosen": "same"},
    "one_expert": {"rows": 3, "width": 5, "k": 1, "experts": 1},
    "scatter": {"rows": 6, "width": 8, "k": 3, "experts": 10, "row_idx_type": 1},
    "gather": {"rows": 6, "width": 8, "k": 3, "experts": 10, "row_idx_type": 0},
    "any_number": {"rows": 6, "width": 8, "k": 3, "experts": 10, "active_num": "any"},
    "default_number": {"rows": 6, "width": 8, "k": 3, "experts": 10, "active_num": None},
    "active": {"rows": 9, "width": 8, "k": 4, "experts": 16, "active": [5, 11]},
    "active_ends": {"rows": 9, "width": 8, "k": 4, "experts": 16, "active": [0, 11], "count": False},
    "active_scatter": {"rows": 9, "width": 8, "k": 4, "experts": 16, "active": [5, 16], "row_idx_type": 1},
    "default_range": {"rows": 4, "width": 8, "k": 2, "experts": 6, "active": "default"},
    "none_for_the_active": {"rows": 4, "width": 8, "k": 2, "experts": 8, "chosen": "first", "active": [4, 8]},
    "finished_rows": {"rows": 6, "width": 8, "k": 3, "experts": 10, "chosen": "finished"},
}

_BASE: dict[str, Any] = {"rows": 3, "width": 4, "k": 2, "experts": 8, "row_idx_type": 0}

_ONLY_THE_HOST = ("cpu",)
"""Where the values of a tensor are read before the kernel runs; a device checks none."""

OPERATOR = OperatorRecord(
    name="npu_moe_init_routing_v2",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("one_dimensional", {"x": lambda x: x[0]}, "x", _BASE),
        Invalid("integers", {"x": np.ones((3, 4), np.int32)}, "x", _BASE),
        Invalid("experts_of_fewer_rows", {"expert_idx": lambda idx: idx[1:]}, "expert_idx", _BASE),
        Invalid("experts_flat", {"expert_idx": lambda idx: idx.reshape(-1)}, "expert_idx", _BASE),
        Invalid("experts_as_int64", {"expert_idx": lambda idx: idx.astype(np.int64)}, "expert_idx", _BASE),
        Invalid("expert_negative", {"expert_idx": lambda idx: idx - 8}, "expert_idx", _BASE, only_on=_ONLY_THE_HOST),
        Invalid("expert_too_large", {"expert_idx": lambda idx: idx + 9}, "expert_idx", _BASE, only_on=_ONLY_THE_HOST),
        Invalid("no_experts", {"expert_num": 0}, "expert_num", _BASE),
        Invalid("experts_not_told", {"expert_num": -1}, "expert_num", _BASE),
        Invalid("too_many_experts", {"expert_num": 10241}, "expert_num", _BASE),
        Invalid("fewer_copies", {"active_num": 4}, "active_num", _BASE),
        Invalid("another_number_of_copies", {"active_num": -2}, "active_num", _BASE),
        Invalid("pairs", {"expert_tokens_num_type": 2}, "expert_tokens_num_type", _BASE),
        Invalid("no_counts", {"expert_tokens_num_flag": False}, "expert_tokens_num_flag", _BASE),
        Invalid("empty_range", {"active_expert_range": [3, 3]}, "active_expert_range", _BASE),
        Invalid("range_beyond_the_experts", {"active_expert_range": [3, 9]}, "active_expert_range", _BASE),
        Invalid("range_below_zero", {"active_expert_range": [-1, 3]}, "active_expert_range", _BASE),
        Invalid("another_index", {"row_idx_type": 2}, "row_idx_type", _BASE),
        Invalid("scale", {"scale": np.ones(3, np.float32)}, "scale", _BASE),
        Invalid("offset", {"offset": np.ones(3, np.float32)}, "offset", _BASE),
        Invalid("capacity", {"expert_capacity": 4}, "expert_capacity", _BASE),
        Invalid("padded", {"drop_pad_mode": 1}, "drop_pad_mode", _BASE),
        Invalid("quantised", {"quant_mode": 1}, "quant_mode", _BASE),
        Invalid("narrow", {"x_dtype": 1}, "x_dtype", _BASE),
    ),
)
