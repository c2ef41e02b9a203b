"""npu_incre_flash_attention: decode attention of one query position over a window of a fixed cache.

Shapes: query (B,1,Nq·D) BSH, (B,1,Nq,D) BSND or (B,Nq,1,D) BNSD; key and value likewise with Nkv heads and S
slots. The window of row b with length n: [0, n), or with kv_padding_size p (element 0; below 0 counts as 0)
[S-p-n, S-p); a window that would start before 0, or of length 0, gives zeros. atten_mask (B,M), (B,1,M) or
(B,1,1,M) in cache coordinates, True = drop: -1e12 in place of the score, so a row that loses its whole window
is the mean of V over it.

Tolerance: see ``attention``; scores and softmax are float32 for every dtype. A filled score has no error.
"""

# ruff: noqa: N803, N806  (dimensions are spelled as in the documentation)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import attention
from qwen2_npu.conformance.operators.prompt_flash_attention import refused
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FILL = -1e12


def build(
    rng: np.random.Generator,
    B: int = 1,
    S: int = 16,
    Nq: int = 2,
    Nkv: int = 2,
    D: int = 64,
    layout: str | None = "BSND",
    mask: str | None = None,
    mask_shape: str = "BS",
    mask_length: int | None = None,
    mask_dtype: str = "bool",
    lengths: Sequence[int] | None = None,
    padding: int | Sequence[int] | None = None,
    spread: float = 1.0,
    scale: float | None = 0.0,
    stale: float = 1.0,
    names: tuple[str, str] = ("scale_value", "actual_seq_lengths"),
    **options: int | float | bool,
) -> Arguments:
    """``padding`` is kv_padding_size; ``stale`` scales the slots outside the window, which must not matter.

    ``scale``, ``spread``, ``options`` and ``names`` are as in ``prompt_flash_attention``.
    """
    shapes = {"query": (B, Nq, 1, D), "key": (B, Nkv, S, D), "value": (B, Nkv, S, D)}
    bnsd = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    bnsd["query"] *= spread
    first_padding = None if padding is None else int(np.atleast_1d(padding)[0])
    for row, length in enumerate(attention.per_row(lengths, B, S)):
        start, end = window(S, length, first_padding)
        for name in ("key", "value"):
            bnsd[name][row, :, :start] *= stale
            bnsd[name][row, :, end:] *= stale
    arguments: Arguments = {name: attention.from_bnsd(x, layout or "BSH") for name, x in bnsd.items()}
    drop = None
    if mask is not None:
        M = S if mask_length is None else mask_length
        kinds = {
            "random": rng.random((B, M)) < 0.4,
            "everything": np.ones((B, M), bool),
            "nothing": np.zeros((B, M), bool),
            "left_padding": np.arange(M)[None, :] < rng.integers(0, max(1, M // 2), (B, 1)),
        }
        drop = (
            kinds[mask].astype(mask_dtype).reshape({"BS": (B, M), "B1S": (B, 1, M), "B11S": (B, 1, 1, M)}[mask_shape])
        )
    optional = {
        "atten_mask": drop,
        "kv_padding_size": None if padding is None else np.atleast_1d(np.asarray(padding, np.int64)),
        "num_heads": Nq,
        "num_key_value_heads": Nkv if Nkv != Nq else None,
        "input_layout": layout,
        names[0]: 1 / np.sqrt(D).item() if scale == 0.0 else scale,
        names[1]: list(lengths) if lengths is not None else None,
    }
    return arguments | {name: value for name, value in optional.items() if value is not None} | options


def window(slots: int, length: int, padding: int | None) -> tuple[int, int]:
    """[start, end) of the live slots; empty where it would start before the buffer."""
    if padding is None:
        return 0, length
    end = slots - max(padding, 0)
    return (end - length, end) if end - length >= 0 else (0, 0)


def decode(arguments: Arguments, dtype: str, scale: float, lengths: Sequence[int] | None) -> tuple[Expected, ...]:
    """Output and log-sum-exp from the arguments that IFA and its successor name alike, and those they do not."""
    layout, heads = arguments.get("input_layout", "BSH"), arguments.get("num_heads", 1)
    kv_heads = arguments.get("num_key_value_heads", 0) or heads
    q = attention.to_bnsd(arguments["query"], attention.input_layout(layout), heads)
    k, v = (attention.to_bnsd(arguments[name], attention.input_layout(layout), kv_heads) for name in ("key", "value"))
    B, slots = q.shape[0], k.shape[2]
    padding = arguments.get("kv_padding_size")
    mask = arguments.get("atten_mask")
    out, bound = np.zeros_like(q), np.zeros_like(q)
    lse, lse_bound = np.full((B, heads, 1, 1), np.inf), np.zeros((B, heads, 1, 1))
    for b, length in enumerate(attention.per_row(lengths, B, slots)):
        start, end = window(slots, length, None if padding is None else int(padding[0]))
        keep = np.ones((1, end - start), bool)
        if mask is not None:
            keep = ~mask.reshape(B, -1)[b : b + 1, start:end].astype(bool)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            live = slice(start, end)
            made = attention.attend(q[b, head], k[b, kv_head, live], v[b, kv_head, live], scale, keep, dtype, fill=FILL)
            out[b, head], bound[b, head] = made.out, made.bound
            lse[b, head, :, 0], lse_bound[b, head, :, 0] = made.lse, made.lse_bound
    target = attention.output_layout(layout)
    return (
        Expected("attention_out", attention.from_bnsd(out, target), attention.from_bnsd(bound, target)),
        Expected("softmax_lse", lse, lse_bound, np.isfinite(lse) & (lse > FILL / 2), dtype="float32"),
    )


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    return decode(arguments, dtype, arguments.get("scale_value", 1.0), arguments.get("actual_seq_lengths"))[:1]


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    @st.composite
    def parameters(draw: st.DrawFn) -> dict[str, Any]:
        B, Nkv, S = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)))
        made: dict[str, Any] = {
            "B": B,
            "S": S,
            "Nkv": Nkv,
            "Nq": Nkv * draw(st.sampled_from([1, 2, 7])),
            "D": draw(st.sampled_from([16, 64, 80, 128])),
            "layout": draw(st.sampled_from(["BSH", "BSND", "BNSD"])),
        }
        count = draw(st.sampled_from([0, 1, B]))
        if count:
            made["lengths"] = draw(st.lists(st.integers(0, S), min_size=count, max_size=count))
            if draw(st.booleans()):
                made["padding"] = draw(st.integers(-2, S))
        if draw(st.booleans()):
            made["mask"] = draw(st.sampled_from(["random", "everything", "nothing"]))
            made["mask_shape"] = draw(st.sampled_from(["BS", "B1S", "B11S"]))
            made["mask_dtype"] = draw(st.sampled_from(["bool", "int8", "uint8"]))
        return made

    return parameters()


# What the successor operator computes alike; it runs these samples, too.
SAMPLES: dict[str, dict[str, Any]] = {
    "regular": {"B": 2, "S": 33, "Nq": 4, "Nkv": 2},
    "BSH": {"B": 2, "S": 17, "layout": "BSH", "mask": "random"},
    "BNSD": {"B": 2, "S": 17, "Nq": 4, "layout": "BNSD", "mask": "random"},
    "default_layout": {"B": 2, "S": 9, "layout": None},
    "default_scale": {"S": 9, "scale": None, "spread": 0.1},
    "zero_key_value_heads": {"S": 9, "num_key_value_heads": 0},
    "one_slot": {"B": 2, "S": 1},
    "grouped_7": {"B": 2, "S": 20, "Nq": 14, "Nkv": 2, "lengths": [20, 3]},
    "grouped_7_of_4": {"B": 1, "S": 12, "Nq": 28, "Nkv": 4, "D": 128, "lengths": [9]},
    "grouped_8": {"B": 2, "S": 12, "Nq": 16, "Nkv": 2, "D": 128, "layout": "BNSD", "lengths": [9]},
    "one_kv_head": {"B": 2, "S": 12, "Nq": 8, "Nkv": 1},
    "width_80": {"S": 9, "D": 80},
    "width_odd": {"S": 9, "D": 33, "mask": "random"},
    "several_tiles": {"B": 2, "S": 700, "lengths": [600, 130], "mask": "random"},
    "long_cache_short_rows": {"B": 3, "S": 512, "lengths": [1, 7, 130], "Nq": 4, "Nkv": 2},
    "lengths_shared": {"B": 3, "S": 16, "lengths": [5]},
    "lengths_ragged": {"B": 3, "S": 16, "lengths": [16, 1, 7], "layout": "BSH"},
    "lengths_zero": {"B": 3, "S": 16, "lengths": [0, 4, 0]},
    "lengths_all_zero": {"B": 2, "S": 16, "lengths": [0], "layout": "BNSD"},
    "padding_zero": {"B": 3, "S": 16, "lengths": [16, 1, 7], "padding": 0},
    "padding": {"B": 3, "S": 16, "lengths": [5, 1, 7], "padding": 4, "Nq": 4, "Nkv": 2},
    "padding_BNSD": {"B": 2, "S": 16, "lengths": [5, 8], "padding": 3, "layout": "BNSD"},
    "padding_BSH": {"B": 2, "S": 16, "lengths": [5, 8], "padding": 3, "layout": "BSH"},
    "padding_negative": {"B": 2, "S": 16, "lengths": [5, 8], "padding": -3},
    "padding_reads_one_element": {"B": 2, "S": 16, "lengths": [5, 8], "padding": [2, 5]},
    "padding_exact_fit": {"B": 2, "S": 16, "lengths": [12, 11], "padding": 4},
    "padding_before_start": {"B": 2, "S": 16, "lengths": [13, 12], "padding": 4},
    "padding_of_whole_cache": {"B": 2, "S": 16, "lengths": [3], "padding": 16},
    "padding_above_cache": {"B": 2, "S": 16, "lengths": [3], "padding": 40},
    "padding_length_zero": {"B": 2, "S": 16, "lengths": [0, 3], "padding": 2},
    "padding_shared_length": {"B": 2, "S": 16, "lengths": [6], "padding": 2},
    "mask_B1S": {"B": 3, "S": 16, "mask": "random", "mask_shape": "B1S"},
    "mask_B11S": {"B": 3, "S": 16, "mask": "random", "mask_shape": "B11S", "Nq": 4, "Nkv": 2},
    "mask_int8": {"B": 3, "S": 16, "mask": "random", "mask_dtype": "int8"},
    "mask_uint8": {"B": 3, "S": 16, "mask": "random", "mask_dtype": "uint8", "mask_shape": "B11S"},
    "mask_left_padding": {"B": 3, "S": 16, "mask": "left_padding", "lengths": [12]},
    "mask_drops_nothing": {"B": 3, "S": 16, "mask": "nothing"},
    "mask_drops_everything": {"B": 3, "S": 16, "mask": "everything"},
    "mask_drops_the_window": {"B": 3, "S": 16, "mask": "everything", "lengths": [9, 1, 0]},
    "mask_in_cache_coordinates": {"B": 2, "S": 16, "mask": "random", "lengths": [6, 9], "padding": 3},
    "mask_drops_right_aligned": {"B": 2, "S": 16, "mask": "everything", "lengths": [6, 9], "padding": 3},
    "mask_shorter_than_cache": {"B": 2, "S": 48, "mask": "random", "mask_length": 24, "lengths": [20, 24]},
    "stale_slots": {"B": 3, "S": 33, "lengths": [20, 1, 0], "stale": 1e4},
    "stale_slots_on_both_sides": {
        "B": 2,
        "S": 33,
        "lengths": [20, 1],
        "padding": 5,
        "stale": 1e4,
        "mask": "random",
    },
    "peaked": {"B": 2, "S": 33, "spread": 6.0},
    "uniform": {"B": 2, "S": 33, "spread": 0.0},
    "scores_beyond_exp": {"B": 2, "S": 33, "spread": 60.0},
    "grouped_6": {"B": 2, "S": 12, "Nq": 12, "Nkv": 2, "D": 128, "lengths": [9, 12]},
}

_BASE: dict[str, Any] = {"B": 2, "S": 16, "Nq": 4, "Nkv": 2, "lengths": [5, 8]}
_GIVEN_MASK: dict[str, Any] = {**_BASE, "mask": "random"}


def invalid_everywhere(lengths: str) -> tuple[Invalid, ...]:
    """What IFA and its successor refuse alike; the list of KV lengths under its name."""
    p = np.array([3])
    return (
        Invalid("layout_SBND", {"input_layout": "SBND"}, "input_layout", _BASE),
        Invalid("heads_of_query", {"num_heads": 2}, "num_heads", _BASE),
        Invalid("ungrouped_heads", {}, "num_key_value_heads", {**_BASE, "Nq": 3}),
        Invalid("ratio_above_64", {}, "num_key_value_heads", {**_BASE, "Nq": 65, "Nkv": 1}),
        Invalid("dtype_of_key", {"key": np.ones((2, 16, 2, 64), np.int8)}, "key", _BASE),
        Invalid("length_of_value", {"value": lambda v: v[:, :9]}, "value", _BASE),
        Invalid("batch_of_key", {"key": lambda k: k[:1]}, "key", _BASE),
        Invalid("length_above_cache", {lengths: [17, 3]}, lengths, _BASE),
        Invalid("length_negative", {lengths: [-1, 3]}, lengths, _BASE),
        Invalid("lengths_of_other_batch", {lengths: [3, 3, 3]}, lengths, _BASE),
        Invalid(
            "padding_without_lengths",
            {"kv_padding_size": p},
            "kv_padding_size",
            {name: value for name, value in _BASE.items() if name != "lengths"},
        ),
        Invalid("padding_of_int32", {"kv_padding_size": p.astype(np.int32)}, "kv_padding_size", _BASE),
        Invalid("padding_of_floats", {"kv_padding_size": p.astype(np.float32)}, "kv_padding_size", _BASE),
        Invalid("mask_of_floats", {"atten_mask": lambda mask: mask.astype(np.float32)}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_of_one_row", {"atten_mask": lambda mask: mask[:1]}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_of_more_rows", {"atten_mask": np.zeros((3, 16), bool)}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_too_short", {"atten_mask": lambda mask: mask[:, :7]}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_per_query", {"atten_mask": np.zeros((2, 2, 16), bool)}, "atten_mask", _GIVEN_MASK),
        Invalid("mask_per_head", {"atten_mask": np.zeros((2, 4, 1, 16), bool)}, "atten_mask", _GIVEN_MASK),
        Invalid("pse_shift", {"pse_shift": np.zeros((2, 4, 1, 16), np.float32)}, "pse_shift", _BASE),
        Invalid("block_table", {"block_table": np.zeros((2, 1), np.int32)}, "block_table", _BASE),
    )


OPERATOR = OperatorRecord(
    name="npu_incre_flash_attention",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        Invalid("two_queries", {"query": np.ones((2, 2, 4, 64))}, "query", _BASE),
        *invalid_everywhere("actual_seq_lengths"),
        *refused(
            (
                "padding_mask",
                "antiquant_scale",
                "antiquant_offset",
                "dequant_scale1",
                "quant_scale1",
                "dequant_scale2",
                "quant_scale2",
                "quant_offset2",
            ),
            _BASE,
        ),
    ),
    skips=(
        Skip("block_size", "read with a block_table only, which is refused"),
        Skip(
            "NaN outside the window",
            "a cache starts as zeros and keeps stale finite values: those are sampled",
        ),
    ),
)
