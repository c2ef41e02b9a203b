"""npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, slot_mapping, cache_mode='Norm'): k and v of one slot
per token, written into a cache of blocks.

    cache[slot // block, slot % block] = states       of k and of v

Shapes: key (T, K, D), value (T, K, Dv), caches (blocks, block, K, D) and (…, Dv), slot_mapping (T,) int32 or int64
without duplicates. ``npu_scatter_pa_kv_cache`` writes its caches and returns nothing;
``npu_scatter_pa_kv_cache_functional``, which graphs hold, returns new ones. Nothing is computed, so the tolerance is
zero, on the slots that stay as they were, too. The device checks no bounds; eager kernels on a CPU raise IndexError
before anything is written. The layout 'PA_NZ' and compressed rows are not in this catalogue: the model has neither.
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
    blocks: int,
    block: int,
    slots: Sequence[int],
    heads: int = 2,
    width: int = 64,
    value_width: int | None = None,
    slot_dtype: str = "int64",
) -> Arguments:
    value_width = width if value_width is None else value_width
    return {
        "key": rng.standard_normal([len(slots), heads, width]),
        "value": rng.standard_normal([len(slots), heads, value_width]),
        "key_cache": rng.standard_normal([blocks, block, heads, width]),
        "value_cache": rng.standard_normal([blocks, block, heads, value_width]),
        "slot_mapping": np.asarray(slots, dtype=slot_dtype),
        "cache_mode": "Norm",
    }


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    made = []
    for states, cache in (("key", "key_cache"), ("value", "value_cache")):
        out = arguments[cache].copy()
        flat = out.reshape(-1, *out.shape[2:])
        for token, slot in enumerate(arguments["slot_mapping"]):
            flat[slot] = arguments[states][token]
        made.append(Expected(cache, out, np.zeros_like(out)))
    return tuple(made)


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    @st.composite
    def parameters(draw: st.DrawFn) -> dict[str, Any]:
        blocks, block = draw(st.integers(1, 5)), draw(st.integers(1, 8))
        slots = st.lists(st.integers(0, blocks * block - 1), min_size=1, max_size=blocks * block, unique=True)
        return {
            "blocks": blocks,
            "block": block,
            "slots": draw(slots),
            "heads": draw(st.integers(1, 4)),
            "width": draw(st.integers(1, 20)),
            "value_width": draw(st.integers(1, 20)),
            "slot_dtype": draw(st.sampled_from(["int32", "int64"])),
        }

    return parameters()


SAMPLES: dict[str, dict[str, Any]] = {
    "decode": {"blocks": 3, "block": 16, "slots": [5, 16, 47]},
    "one_row": {"blocks": 1, "block": 16, "slots": [7]},
    "head_dim_128": {"blocks": 2, "block": 8, "slots": [0, 15], "heads": 4, "width": 128},
    "prefill": {"blocks": 2, "block": 8, "slots": [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]},
    "other_order": {"blocks": 2, "block": 8, "slots": [13, 2, 8]},
    "into_one_block": {"blocks": 4, "block": 8, "slots": [9, 8, 15]},
    "int32_slots": {"blocks": 3, "block": 16, "slots": [5, 16, 47], "slot_dtype": "int32"},
    "other_value_width": {"blocks": 2, "block": 4, "slots": [3, 4], "width": 32, "value_width": 16},
    "every_slot": {"blocks": 2, "block": 3, "slots": [5, 0, 4, 1, 3, 2], "width": 8},
}

_BASE: dict[str, Any] = {"blocks": 2, "block": 8, "slots": [3, 12]}


def _past_the_end(name: str, slots: list[int]) -> Invalid:
    return Invalid(name, {"slot_mapping": np.array(slots)}, "slot_mapping", _BASE, IndexError, only_on=("cpu",))


INVALID = (
    Invalid("two_dimensional_key", {"key": lambda key: key[0]}, "key", _BASE),
    Invalid("key_of_other_dtype", {"key": np.ones((2, 2, 64), np.int32)}, "value", _BASE),
    Invalid("value_of_other_tokens", {"value": lambda value: value[:1]}, "value", _BASE),
    Invalid("value_of_other_heads", {"value": lambda value: value[:, :1]}, "value", _BASE),
    Invalid("value_of_other_dtype", {"value": np.ones((2, 2, 64), np.int32)}, "value", _BASE),
    Invalid("key_cache_of_other_width", {"key_cache": lambda cache: cache[..., :32]}, "key_cache", _BASE),
    Invalid("key_cache_of_other_rank", {"key_cache": lambda cache: cache[0]}, "key_cache", _BASE),
    Invalid("value_cache_of_other_width", {"value_cache": lambda cache: cache[..., :32]}, "value_cache", _BASE),
    Invalid("value_cache_of_fewer_blocks", {"value_cache": lambda cache: cache[:1]}, "value_cache", _BASE),
    Invalid("two_dimensional_slots", {"slot_mapping": np.array([[3, 12]])}, "slot_mapping", _BASE),
    Invalid("slots_of_floats", {"slot_mapping": np.array([3.0, 12.0], np.float32)}, "slot_mapping", _BASE),
    Invalid("fewer_slots_than_tokens", {"slot_mapping": np.array([3])}, "slot_mapping", _BASE),
    Invalid("nz_blocks", {"cache_mode": "PA_NZ"}, "cache_mode", _BASE),
    Invalid("compressed_rows", {"compress_lens": np.array([1, 1])}, "compress_lens", _BASE),
    Invalid("compressed_offsets", {"compress_seq_offsets": np.array([1, 1])}, "compress_seq_offsets", _BASE),
    Invalid("lengths_of_rows", {"seq_lens": np.array([1, 1])}, "seq_lens", _BASE),
    _past_the_end("past_the_end", [3, 16]),
    _past_the_end("far_past_the_end", [3, 1 << 20]),
    _past_the_end("negative_slot", [-1, 3]),
)


OUT_OF_PLACE = OperatorRecord(
    name="npu_scatter_pa_kv_cache_functional",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=INVALID,
)
IN_PLACE = replace(
    OUT_OF_PLACE,
    name="npu_scatter_pa_kv_cache",
    writes=("key_cache", "value_cache"),
    graph_writes=("key_cache", "value_cache"),
)
