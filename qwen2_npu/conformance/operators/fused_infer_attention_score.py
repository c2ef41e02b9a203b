"""npu_fused_infer_attention_score, successor of both attention operators: (attention_out, softmax_lse).

One query position takes the decode path, more take the prefill path: goldens and samples are
``incre_flash_attention``'s and ``prompt_flash_attention``'s under the new names (scale,
actual_seq_lengths_kv) and defaults (next_tokens unlimited, inner_precise 0: scores and softmax in float32 for
float16, too; 1: as in prompt_flash_attention).

softmax_lse (B,N,Sq,1) float32 is log Σ exp(score), with softmax_lse_flag; without it only its presence is
fixed. Tolerance of the log: the relative error of the sum, plus 4 u32 of its own magnitude for log, addition
and rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_npu.conformance.operators import incre_flash_attention as ifa
from qwen2_npu.conformance.operators import prompt_flash_attention as pfa
from qwen2_npu.conformance.operators.record import Arguments, Expected, Invalid, OperatorRecord, Sample, Skip

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def build(rng: np.random.Generator, **parameters: Any) -> Arguments:
    """``S`` among the parameters means decode (``ifa.build``), otherwise prefill (``pfa.build``)."""
    if "S" in parameters:
        return ifa.build(rng, names=("scale", "actual_seq_lengths_kv"), **parameters)
    return pfa.build(rng, names=("scale", "actual_seq_lengths", "actual_seq_lengths_kv"), **parameters)


def query_length(arguments: Arguments) -> int:
    """Sq: axis 2 in BNSD, axis 1 otherwise."""
    axis = 2 if arguments.get("input_layout", "BSH").startswith("BNSD") else 1
    return int(arguments["query"].shape[axis])


def golden(arguments: Arguments, dtype: str) -> tuple[Expected, ...]:
    scale, kv_lengths = arguments.get("scale", 1.0), arguments.get("actual_seq_lengths_kv")
    if query_length(arguments) == 1:
        out, lse = ifa.decode(arguments, dtype, scale, kv_lengths)
    else:
        out, lse = pfa.prefill(
            arguments,
            dtype,
            scale,
            q_lengths=arguments.get("actual_seq_lengths"),
            kv_lengths=kv_lengths,
            next_tokens=arguments.get("next_tokens", pfa.UNLIMITED),
            float16_scores=arguments.get("inner_precise", 0) == 1,
        )
    if not arguments.get("softmax_lse_flag", False):
        lse = Expected("softmax_lse", None, dtype="float32")
    return out, lse


def strategy() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    return st.one_of(pfa.strategy(), ifa.strategy())


OWN: dict[str, dict[str, Any]] = {
    "default_next_tokens": {"B": 2, "Sq": 9, "mask": "random"},
    "inner_precise_1": {"B": 2, "Sq": 9, "mask": "random", "inner_precise": 1},
    "prefill_scores_beyond_exp": {"B": 2, "Sq": 9, "mask": "random", "spread": 60.0},
    "prefill_lse": {"B": 2, "Sq": 9, "Nq": 4, "Nkv": 2, "mask": "causal", "softmax_lse_flag": True},
    "prefill_lse_ragged": {
        "B": 2, "Sq": 9, "layout": "BNSD", "q_lengths": [9, 4], "kv_lengths": [9, 6], "softmax_lse_flag": True,
    },
    "decode_lse": {"B": 2, "S": 33, "Nq": 4, "Nkv": 2, "lengths": [20, 33], "softmax_lse_flag": True},
    "decode_lse_BSH": {"B": 2, "S": 33, "layout": "BSH", "mask": "random", "softmax_lse_flag": True},
}  # fmt: skip

SAMPLES: dict[str, dict[str, Any]] = (
    {f"prefill_{name}": parameters for name, parameters in pfa.SHARED.items()}
    | {f"decode_{name}": parameters for name, parameters in ifa.SAMPLES.items()}
    | OWN
)

_PREFILL: dict[str, Any] = {"B": 2, "Sq": 6, "Nq": 4, "Nkv": 2}
_REFUSED = (
    "dequant_scale1",
    "quant_scale1",
    "dequant_scale2",
    "quant_scale2",
    "quant_offset2",
    "antiquant_scale",
    "antiquant_offset",
    "key_antiquant_scale",
    "key_antiquant_offset",
    "value_antiquant_scale",
    "value_antiquant_offset",
    "key_shared_prefix",
    "value_shared_prefix",
    "query_rope",
    "key_rope",
    "key_rope_antiquant_scale",
)


def _renamed(prefix: str, invalid: tuple[Invalid, ...]) -> tuple[Invalid, ...]:
    return tuple(
        Invalid(f"{prefix}_{one.name}", one.change, one.match, one.parameters, one.error, one.only_on)
        for one in invalid
    )


OPERATOR = OperatorRecord(
    name="npu_fused_infer_attention_score",
    build=build,
    golden=golden,
    samples=Sample.numbered(SAMPLES),
    strategy=strategy,
    invalid=(
        *_renamed("prefill", pfa.invalid_everywhere("actual_seq_lengths", "actual_seq_lengths_kv")),
        *_renamed("decode", ifa.invalid_everywhere("actual_seq_lengths_kv")),
        *pfa.refused(_REFUSED, _PREFILL),
        Invalid("shared_prefix_length", {"actual_shared_prefix_len": [1]}, "actual_shared_prefix_len", _PREFILL),
        Invalid("query_padding", {"query_padding_size": np.array([1])}, "query_padding_size", _PREFILL),
        Invalid("antiquant_mode", {"antiquant_mode": 1}, r"\bantiquant_mode", _PREFILL),
        Invalid("key_antiquant_mode", {"key_antiquant_mode": 1}, "key_antiquant_mode", _PREFILL),
        Invalid("value_antiquant_mode", {"value_antiquant_mode": 1}, "value_antiquant_mode", _PREFILL),
    ),
    skips=(
        Skip(
            "softmax_lse without its flag",
            "only its presence is documented: neither shape nor values are compared",
        ),
        Skip("block_size", "read with a block_table only, which is refused"),
    ),
)
