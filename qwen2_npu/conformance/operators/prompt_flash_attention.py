"""npu_prompt_flash_attention: prefill attention over a masked, banded, ragged batch.

Shapes: query (B,Sq,Nq·D) BSH, (B,Sq,Nq,D) BSND or (B,Nq,Sq,D) BNSD; key and value likewise with Nkv heads and
Skv positions. atten_mask True = drop; (Sq,Skv), (1|B,Sq,Skv) or (1|B,1,Sq,Skv); for sparse modes 2-4 the
2048×2048 triu(1).

sparse_mode 0: the mask, and a band of pre/next tokens from the top-left corner, ignored without a mask; 1:
the mask alone; 2: causal from the top left; 3: causal from the bottom right; 4: a band from the bottom right.
"Bottom right" is the end of the row's actual lengths. ``sparse_mode + 10`` is the same at high precision.

Not defined, hence not compared: rows that lose every position to their mask, and, in mode 0, rows whose mask
keeps what the band drops (the device decides that by tile). Tolerance: see ``attention``.
"""

# ruff: noqa: N803, N806  (dimensions are spelled as in the documentation)

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import attention
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip
from qwen2_npu.conformance.operators.rounding import Array

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

UNLIMITED = 2147483647
COMPRESSED_MASK = 2048


@cache
def compressed_mask(dtype: str) -> Array:
    mask = np.triu(np.ones((COMPRESSED_MASK, COMPRESSED_MASK), dtype), 1)
    mask.flags.writeable = False
    return mask


def make_mask(rng: np.random.Generator, kind: str, shape: str, dtype: str, B: int, Sq: int, Skv: int) -> Array:
    """True = drop. ``shape`` is 'SS', '1SS', 'BSS', '11SS' or 'B1SS'; every kind but 'blind' keeps position 0."""
    if kind == "compressed":
        return compressed_mask(dtype)
    batch = B if shape.startswith("B") else 1
    i, j = np.arange(Sq)[:, None], np.arange(Skv)[None, :]
    drop = {
        "causal": np.broadcast_to(j > i, (batch, Sq, Skv)),
        "causal_bottom_right": np.broadcast_to(j > i + Skv - Sq, (batch, Sq, Skv)),
        "band": np.broadcast_to((j > i + 2) | (j < i - 3), (batch, Sq, Skv)),
        "random": rng.random((batch, Sq, Skv)) < 0.4,
        "left_padding": np.broadcast_to(j < rng.integers(0, Skv, (batch, 1, 1)), (batch, Sq, Skv)),
        "keep_all": np.zeros((batch, Sq, Skv), bool),
        "blind": np.broadcast_to(i % 2 == 0, (batch, Sq, Skv)),
    }[kind].copy()
    if kind == "random":
        drop[..., :1] = False
    shaped = {"SS": drop[0], "11SS": drop[:, None], "B1SS": drop[:, None]}.get(shape, drop)
    return np.ascontiguousarray(shaped.astype(dtype))


def build(
    rng: np.random.Generator,
    B: int = 1,
    Sq: int = 5,
    Skv: int | None = None,
    Nq: int = 2,
    Nkv: int = 2,
    D: int = 64,
    layout: str | None = "BSND",
    mask: str | None = None,
    mask_shape: str = "SS",
    mask_dtype: str = "bool",
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    spread: float = 1.0,
    scale: float | None = 0.0,
    stale: float = 1.0,
    names: tuple[str, str, str] = ("scale_value", "actual_seq_lengths", "actual_seq_lengths_kv"),
    **options: int | float | bool,
) -> Arguments:
    """``spread`` scales the queries; ``scale`` 0.0 means 1/sqrt(D) and None the operator's default; ``stale``
    scales the keys and values beyond ``kv_lengths``, which must not matter.

    ``options`` are the operator's own attributes (sparse_mode, pre_tokens, ...). ``names`` are the operator's
    names for the scale and the two lists of lengths; the successor operator renames them.
    """
    Skv = Sq if Skv is None else Skv
    shapes = {"query": (B, Nq, Sq, D), "key": (B, Nkv, Skv, D), "value": (B, Nkv, Skv, D)}
    bnsd = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    bnsd["query"] *= spread
    for row, length in enumerate(attention.per_row(kv_lengths, B, Skv)):
        bnsd["key"][row, :, length:] *= stale
        bnsd["value"][row, :, length:] *= stale
    laid_out = attention.input_layout(layout or "BSH")
    arguments: Arguments = {name: attention.from_bnsd(x, laid_out) for name, x in bnsd.items()}
    optional = {
        "atten_mask": make_mask(rng, mask, mask_shape, mask_dtype, B, Sq, Skv) if mask else None,
        "num_heads": Nq,
        "num_key_value_heads": Nkv if Nkv != Nq else None,
        "input_layout": layout,
        names[0]: 1 / np.sqrt(D).item() if scale == 0.0 else scale,
        names[1]: list(q_lengths) if q_lengths is not None else None,
        names[2]: list(kv_lengths) if kv_lengths is not None else None,
    }
    return arguments | {name: value for name, value in optional.items() if value is not None} | options


def dropped(
    mask: Array | None,
    mode: int,
    pre: int,
    following: int,
    q_len: int,
    kv_len: int,
    row: int,
    shape: tuple[int, int],
) -> tuple[Array, Array]:
    """(drop, undefined rows) of one batch row: bool (Sq,Skv) and (Sq,)."""
    i, j = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    corner = kv_len - q_len
    outside = {
        0: (j > i + following) | (j < i - pre),
        2: j > i,
        3: j > i + corner,
        4: (j > i + corner + following) | (j < i + corner - pre),
    }
    beyond = np.broadcast_to(j >= kv_len, shape)
    if mode in (2, 3, 4):
        drop, inconsistent = np.broadcast_to(outside[mode], shape), np.zeros(shape, bool)
    elif mask is None:
        drop, inconsistent = np.zeros(shape, bool), np.zeros(shape, bool)
    else:
        rows = np.asarray(mask).astype(bool).reshape(-1, *shape)
        drop = rows[row if len(rows) > 1 else 0]
        inconsistent = outside[0] & ~drop & ~beyond if mode == 0 else np.zeros(shape, bool)
    drop = drop | beyond
    fully_masked = drop.all(axis=1) if kv_len else np.zeros(shape[0], bool)
    return drop, np.logical_or(inconsistent.any(axis=1), fully_masked)


def prefill(
    arguments: Arguments,
    dtype: str,
    scale: float,
    q_lengths: Sequence[int] | None,
    kv_lengths: Sequence[int] | None,
    next_tokens: int,
    float16_scores: bool,
) -> tuple[Expected, ...]:
    """Output and log-sum-exp from the arguments that PFA and its successor name alike, and those they do not."""
    layout, heads = arguments.get("input_layout", "BSH"), arguments.get("num_heads", 1)
    kv_heads = arguments.get("num_key_value_heads", 0) or heads
    q = attention.to_bnsd(arguments["query"], attention.input_layout(layout), heads)
    k, v = (attention.to_bnsd(arguments[name], attention.input_layout(layout), kv_heads) for name in ("key", "value"))
    B, _, Sq, _ = q.shape
    q_rows, kv_rows = attention.per_row(q_lengths, B, Sq), attention.per_row(kv_lengths, B, k.shape[2])
    mode = arguments.get("sparse_mode", 0) % 10
    out, bound, defined = np.zeros_like(q), np.zeros_like(q), np.ones(q.shape, bool)
    lse, lse_bound = np.full((B, heads, Sq, 1), np.inf), np.zeros((B, heads, Sq, 1))
    for b in range(B):
        rows = q_rows[b]
        drop, undefined = dropped(
            arguments.get("atten_mask"),
            mode,
            arguments.get("pre_tokens", UNLIMITED),
            next_tokens,
            rows,
            kv_rows[b],
            b,
            (Sq, k.shape[2]),
        )
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            made = attention.attend(
                q[b, head, :rows],
                k[b, kv_head],
                v[b, kv_head],
                scale,
                ~drop[:rows],
                dtype,
                float16_scores=float16_scores and dtype == "float16",
            )
            out[b, head, :rows], bound[b, head, :rows] = made.out, made.bound
            lse[b, head, :rows, 0], lse_bound[b, head, :rows, 0] = made.lse, made.lse_bound
            defined[b, head, :rows] = ~undefined[:rows, None]
    target = attention.output_layout(layout)
    value, bound, mask = (attention.from_bnsd(x, target) for x in (out, bound, defined.astype(float)))
    return (
        Expected("attention_out", value, bound, mask > 0),
        Expected("softmax_lse", lse, lse_bound, np.isfinite(lse) & defined[..., :1], dtype="float32"),
    )


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    return prefill(
        arguments,
        dtype,
        scale=arguments.get("scale_value", 1.0),
        q_lengths=arguments.get("actual_seq_lengths"),
        kv_lengths=arguments.get("actual_seq_lengths_kv"),
        next_tokens=arguments.get("next_tokens", 0),
        float16_scores=arguments.get("sparse_mode", 0) < 10,
    )[:1]


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    @st.composite
    def parameters(draw: st.DrawFn) -> dict[str, Any]:
        B, Nkv, Sq, Skv = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 12), st.integers(1, 20)))
        made: dict[str, Any] = {
            "B": B,
            "Sq": Sq,
            "Skv": Skv,
            "Nkv": Nkv,
            "Nq": Nkv * draw(st.sampled_from([1, 2, 7])),
            "D": draw(st.sampled_from([16, 64, 80, 128])),
            "layout": draw(st.sampled_from(attention.LAYOUTS)),
            "sparse_mode": draw(st.integers(0, 4)),
        }
        if made["sparse_mode"] >= 2:
            made["mask"] = "compressed"
        elif made["sparse_mode"] == 1 or draw(st.booleans()):
            made["mask"] = draw(st.sampled_from(["causal", "random", "left_padding", "keep_all", "blind"]))
            made["mask_shape"] = draw(st.sampled_from(["SS", "1SS", "BSS", "11SS", "B1SS"]))
            made["mask_dtype"] = draw(st.sampled_from(["bool", "int8", "uint8"]))
            made["next_tokens"] = UNLIMITED
        if made["sparse_mode"] == 4:
            made |= {"pre_tokens": draw(st.integers(0, 20)), "next_tokens": draw(st.integers(0, 20))}
        for name, limit in (("q_lengths", Sq), ("kv_lengths", Skv)):
            count = draw(st.sampled_from([0, 1, B]))
            if count:
                made[name] = draw(st.lists(st.integers(0, limit), min_size=count, max_size=count))
        return made

    return parameters()


MASKED: dict[str, Any] = {"mask": "random", "next_tokens": UNLIMITED}
COMPRESSED: dict[str, Any] = {"mask": "compressed"}

# What the successor operator computes alike; it runs these samples, too.
SHARED: dict[str, dict[str, Any]] = {
    "no_mask_is_not_causal": {"B": 2, "Sq": 9},
    "BSH": {"B": 2, "Sq": 7, "layout": "BSH", **MASKED},
    "BNSD": {"B": 2, "Sq": 7, "Nq": 4, "layout": "BNSD", **MASKED},
    "BNSD_BSND": {"B": 2, "Sq": 7, "Nq": 4, "layout": "BNSD_BSND", **MASKED},
    "default_layout": {"B": 2, "Sq": 5, "layout": None},
    "default_scale": {"Sq": 5, "scale": None, "spread": 0.1},
    "zero_key_value_heads": {"Sq": 5, "num_key_value_heads": 0},
    "grouped_2": {"B": 2, "Sq": 6, "Nq": 4, "Nkv": 2, **MASKED},
    "grouped_7": {"B": 1, "Sq": 6, "Nq": 14, "Nkv": 2, "D": 64, **MASKED},
    "grouped_7_of_4": {"B": 1, "Sq": 3, "Nq": 28, "Nkv": 4, "D": 128, "layout": "BNSD"},
    "grouped_8": {"B": 1, "Sq": 5, "Nq": 16, "Nkv": 2, "D": 128, "layout": "BSH", **MASKED},
    "one_kv_head": {"B": 2, "Sq": 5, "Nq": 8, "Nkv": 1, **MASKED},
    "width_80": {"Sq": 5, "D": 80, **MASKED},
    "width_40": {"Sq": 5, "D": 40, **MASKED},
    "width_odd": {"Sq": 5, "D": 33, **MASKED},
    "long_keys": {"B": 1, "Sq": 3, "Skv": 300, "D": 128, **MASKED},
    "several_tiles": {"B": 1, "Sq": 300, "Nq": 2, "Nkv": 1, "sparse_mode": 2, **COMPRESSED},
    "more_queries_than_keys": {"Sq": 17, "Skv": 5, **MASKED},
    "mask_1SS": {"B": 2, "Sq": 6, "mask_shape": "1SS", **MASKED},
    "mask_BSS": {"B": 2, "Sq": 6, "mask_shape": "BSS", **MASKED},
    "mask_11SS": {"B": 2, "Sq": 6, "mask_shape": "11SS", **MASKED},
    "mask_B1SS": {"B": 3, "Sq": 6, "Nq": 4, "Nkv": 2, "mask_shape": "B1SS", **MASKED},
    "mask_int8": {"B": 2, "Sq": 6, "mask_shape": "BSS", "mask_dtype": "int8", **MASKED},
    "mask_uint8": {"B": 2, "Sq": 6, "mask_shape": "B1SS", "mask_dtype": "uint8", **MASKED},
    "mask_drops_nothing": {"B": 2, "Sq": 6, "mask": "keep_all", "next_tokens": UNLIMITED},
    "rectangular_causal": {"Sq": 5, "Skv": 12, "mask": "causal_bottom_right", "next_tokens": UNLIMITED},
    "left_padding": {
        "B": 3, "Sq": 9, "mask": "left_padding", "mask_shape": "B1SS", "next_tokens": UNLIMITED, "sparse_mode": 1,
    },
    "fully_masked_rows": {"B": 2, "Sq": 6, "mask": "blind", "next_tokens": UNLIMITED},
    "mode_0_causal": {"B": 2, "Sq": 9, "mask": "causal", "next_tokens": 0},
    "mode_0_band": {"B": 2, "Sq": 9, "mask": "band", "pre_tokens": 3, "next_tokens": 2},
    "mode_1": {"B": 2, "Sq": 9, "mask": "random", "mask_shape": "BSS", "sparse_mode": 1, "next_tokens": 0},
    "mode_1_ignores_band": {"Sq": 9, "mask": "random", "sparse_mode": 1, "pre_tokens": 0, "next_tokens": 0},
    "mode_2": {"B": 2, "Sq": 9, "sparse_mode": 2, **COMPRESSED},
    "mode_2_wide": {"Sq": 5, "Skv": 12, "sparse_mode": 2, **COMPRESSED},
    "mode_2_tall": {"Sq": 12, "Skv": 5, "sparse_mode": 2, **COMPRESSED},
    "mode_2_int8": {"Sq": 7, "sparse_mode": 2, "mask_dtype": "int8", **COMPRESSED},
    "mode_3": {"B": 2, "Sq": 9, "sparse_mode": 3, **COMPRESSED},
    "mode_3_wide": {"B": 2, "Sq": 5, "Skv": 12, "Nq": 4, "Nkv": 2, "sparse_mode": 3, **COMPRESSED},
    "mode_3_tall": {"Sq": 12, "Skv": 5, "sparse_mode": 3, **COMPRESSED},
    "mode_4": {"B": 2, "Sq": 12, "sparse_mode": 4, "pre_tokens": 3, "next_tokens": 2, **COMPRESSED},
    "mode_4_causal_window": {"Sq": 33, "sparse_mode": 4, "pre_tokens": 7, "next_tokens": 0, **COMPRESSED},
    "mode_4_wide": {"Sq": 5, "Skv": 12, "sparse_mode": 4, "pre_tokens": 3, "next_tokens": 1, **COMPRESSED},
    "mode_4_zero_band": {"Sq": 6, "sparse_mode": 4, "pre_tokens": 0, "next_tokens": 0, **COMPRESSED},
    "q_lengths_shared": {"B": 3, "Sq": 8, "q_lengths": [5], **MASKED},
    "q_lengths_ragged": {"B": 3, "Sq": 8, "q_lengths": [8, 1, 0], **MASKED},
    "kv_lengths_shared": {"B": 3, "Sq": 4, "Skv": 11, "kv_lengths": [6]},
    "kv_lengths_ragged": {"B": 3, "Sq": 4, "Skv": 11, "kv_lengths": [11, 1, 0], "layout": "BNSD"},
    "both_ragged": {"B": 3, "Sq": 7, "Skv": 11, "q_lengths": [7, 3, 1], "kv_lengths": [4, 11, 7], "layout": "BSH"},
    "ragged_mode_1": {
        "B": 2, "Sq": 7, "Skv": 9, "q_lengths": [7, 3], "kv_lengths": [4, 9], "sparse_mode": 1, **MASKED,
    },
    "ragged_mode_2": {
        "B": 2, "Sq": 7, "q_lengths": [7, 3], "kv_lengths": [7, 3], "sparse_mode": 2, **COMPRESSED,
    },
    "ragged_mode_3": {
        "B": 3, "Sq": 7, "Skv": 9, "q_lengths": [7, 3, 2], "kv_lengths": [7, 8, 2], "sparse_mode": 3, **COMPRESSED,
    },
    "ragged_mode_4": {
        "B": 2, "Sq": 7, "Skv": 9, "q_lengths": [7, 3], "kv_lengths": [7, 8], "sparse_mode": 4, "pre_tokens": 2,
        "next_tokens": 1, **COMPRESSED,
    },
    "stale_keys": {"B": 3, "Sq": 4, "Skv": 11, "kv_lengths": [6, 1, 0], "stale": 1e4},
    "empty_keys": {"B": 2, "Sq": 4, "Skv": 0},
    "all_lengths_zero": {"B": 2, "Sq": 4, "Skv": 6, "kv_lengths": [0], "layout": "BSH"},
    "peaked": {"B": 1, "Sq": 9, "spread": 6.0, **MASKED},
    "uniform": {"B": 1, "Sq": 9, "spread": 0.0, **MASKED},
    "grouped_6": {"B": 1, "Sq": 5, "Nq": 12, "Nkv": 2, "D": 128, **MASKED},
}  # fmt: skip

SAMPLES: dict[str, dict[str, Any]] = SHARED | {
    "one_query": {"B": 2, "Sq": 1, "Skv": 9},
    "one_of_everything": {"Sq": 1, "Skv": 1, "Nq": 1, "Nkv": 1},
    "scores_beyond_exp": {"B": 2, "Sq": 9, "spread": 60.0, "sparse_mode": 10, **MASKED},
    "high_precision_0": {"B": 2, "Sq": 9, "sparse_mode": 10, **MASKED},
    "high_precision_2": {"B": 2, "Sq": 9, "spread": 4.0, "sparse_mode": 12, **COMPRESSED},
    "high_precision_3": {"B": 2, "Sq": 5, "Skv": 12, "sparse_mode": 13, **COMPRESSED},
}

_BASE: dict[str, Any] = {"B": 2, "Sq": 6, "Nq": 4, "Nkv": 2}
_GIVEN_MASK: dict[str, Any] = {**_BASE, **MASKED}
_FLOAT = np.ones(1, np.float32)


def invalid_everywhere(q_lengths: str, kv_lengths: str) -> tuple[Invalid, ...]:
    """What PFA and its successor refuse alike; the two lists of lengths under their names."""
    return (
        Invalid("layout_TND", {"input_layout": "TND"}, "input_layout", _BASE),
        Invalid("layout_unknown", {"input_layout": "SBND"}, "input_layout", _BASE),
        Invalid("layout_lowercase", {"input_layout": "bsnd"}, "input_layout", _BASE),
        Invalid("heads_of_query", {"num_heads": 2}, "num_heads", _BASE),
        Invalid("heads_do_not_divide_H", {"num_heads": 5}, "num_heads", {**_BASE, "layout": "BSH"}),
        Invalid("no_heads", {"num_heads": 0}, "num_heads", _BASE),
        Invalid("heads_of_key", {"num_key_value_heads": 4}, "num_key_value_heads", _BASE),
        Invalid("ungrouped_heads", {}, "num_key_value_heads", {**_BASE, "Nq": 3}),
        Invalid("negative_heads", {"num_key_value_heads": -2}, "num_key_value_heads", _BASE),
        Invalid("ratio_above_64", {}, "num_key_value_heads", {**_BASE, "Nq": 65, "Nkv": 1}),
        Invalid("rank_of_query", {"query": lambda q: q[0]}, "query", _BASE),
        Invalid("batch_of_key", {"key": lambda k: k[:1]}, "key", _BASE),
        Invalid("width_of_key", {"key": lambda k: k[..., :32]}, "key", _BASE),
        Invalid("length_of_value", {"value": lambda v: v[:, :3]}, "value", _BASE),
        Invalid("dtype_of_key", {"key": np.ones((2, 6, 2, 64), np.int8)}, "key", _BASE),
        Invalid("dtype_of_value", {"value": np.ones((2, 6, 2, 64), np.int8)}, "value", _BASE),
        Invalid("mask_of_floats", {"atten_mask": lambda mask: mask.astype(np.float32)}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_of_int64", {"atten_mask": lambda mask: mask.astype(np.int64)}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_too_narrow", {"atten_mask": lambda mask: mask[:, :-1]}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_too_short", {"atten_mask": lambda mask: mask[:-1]}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_of_one_row", {"atten_mask": lambda mask: mask[:1]}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_of_other_batch", {"atten_mask": np.zeros((3, 6, 6), bool)}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_per_head", {"atten_mask": np.zeros((2, 4, 6, 6), bool)}, "atten_mask", _GIVEN_MASK),
        Invalid("mode_2_without_mask", {"sparse_mode": 2}, "atten_mask", _BASE),
        Invalid("mode_3_without_mask", {"sparse_mode": 3}, "atten_mask", _BASE),
        Invalid("mode_4_without_mask", {"sparse_mode": 4}, "atten_mask", _BASE),
        Invalid("mode_2_full_mask", {"sparse_mode": 2}, "atten_mask", _GIVEN_MASK),
        Invalid("mode_5", {"sparse_mode": 5}, "sparse_mode", _GIVEN_MASK),
        Invalid("mode_negative", {"sparse_mode": -1}, "sparse_mode", _GIVEN_MASK),
        Invalid("q_length_above_Sq", {q_lengths: [6, 7]}, q_lengths, _BASE),
        Invalid("q_length_negative", {q_lengths: [6, -1]}, q_lengths, _BASE),
        Invalid("q_lengths_of_other_batch", {q_lengths: [6, 6, 6]}, q_lengths, _BASE),
        Invalid("kv_length_above_Skv", {kv_lengths: [6, 7]}, kv_lengths, _BASE),
        Invalid("kv_length_negative", {kv_lengths: [6, -1]}, kv_lengths, _BASE),
        Invalid("kv_lengths_of_other_batch", {kv_lengths: [6, 6, 6]}, kv_lengths, _BASE),
        Invalid("pse_shift", {"pse_shift": np.zeros((2, 4, 6, 6), np.float32)}, "pse_shift", _BASE),
    )


def refused(names: Sequence[str], base: dict[str, Any]) -> tuple[Invalid, ...]:
    """Optional tensors that the operator takes and this set does not compute."""
    return tuple(Invalid(f"{name}_is_refused", {name: _FLOAT}, rf"\b{name}\b", base) for name in names)


QUANTISATION = ("deq_scale1", "quant_scale1", "deq_scale2", "quant_scale2", "quant_offset2")

OPERATOR = OperatorRecord(
    name="npu_prompt_flash_attention",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        *invalid_everywhere("actual_seq_lengths", "actual_seq_lengths_kv"),
        *refused(("padding_mask", *QUANTISATION), _BASE),
    ),
    skips=(
        Skip("layout TND", "restricted on the device and unused by the model: refused"),
        Skip("content of the 2048×2048 mask", "must be triu(1); the device does not check it"),
        Skip(
            "mask and band that contradict each other",
            "tile-dependent on the device: only finiteness is checked",
        ),
    ),
)
