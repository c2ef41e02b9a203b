"""What config.json and generation_config.json may hold: a table for each kind of field."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch

from qwen2_npu.errors import CheckpointError

LARGEST = 2**31 - 1
"""The largest integer: sizes, counts and token ids beyond it belong to no model."""

LARGEST_REAL = 1e6
"""The largest real number: products with a larger one may overflow."""


class Field(Protocol):
    """What a field takes; its text completes "must be ..."."""

    def takes(self, value: Any) -> bool:
        """Whether it takes ``value``, as JSON gives it."""


class Number(NamedTuple):
    """What a field takes: a number from ``low`` to ``high``.

    Attributes:
        real: whether it may have a fraction.
        null: whether the field may be null.
        listed: whether the field may be a list of one or several such numbers, or must be a list of any number.
        length: of that list; None for any.
    """

    low: float
    high: float = LARGEST
    real: bool = False
    null: bool = False
    listed: Literal["no", "may", "must"] = "no"
    length: int | None = None

    def takes(self, value: Any) -> bool:
        """Whether ``value``, as JSON gives it, is such a number."""
        if value is None:
            return self.null
        if isinstance(value, list):
            fits = self.length in (None, len(value)) and (self.listed == "must" or bool(value))
            return self.listed != "no" and fits and all(self._is_one(each) for each in value)
        return self.listed != "must" and self._is_one(value)

    def _is_one(self, value: Any) -> bool:
        kinds = (int, float) if self.real else (int,)
        return type(value) in kinds and self.low <= value <= self.high  # NaN is neither

    def __str__(self) -> str:
        one = f"{'a number' if self.real else 'an integer'} from {self.low:g} to {self.high:.10g}"
        count = "" if self.length is None else f"{self.length} "
        text = {
            "no": one,
            "may": f"{one}, or a list of such numbers",
            "must": f"a list of {count}numbers, each {one}",
        }[self.listed]
        return f"{text}, or null" if self.null else text


class Word(NamedTuple):
    """What a field takes: one of ``values``; or a list of them, or null.

    Attributes:
        text: those in words.
    """

    values: tuple[Any, ...]
    text: str
    listed: bool = False

    def takes(self, value: Any) -> bool:
        """Whether ``value``, as JSON gives it, is one of them."""
        if self.listed:
            return value is None or (isinstance(value, list) and all(self._is_one(each) for each in value))
        return self._is_one(value)

    def _is_one(self, value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return self.text


class Names(NamedTuple):
    """What a field takes: an object, such as the labels of a classifier; or null."""

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is one."""
        return value is None or isinstance(value, dict)

    def __str__(self) -> str:
        return "an object, or null"


def _count(low: int, high: int = LARGEST) -> Number:
    return Number(low, high, null=True)


def _real(low: float, high: float = LARGEST_REAL) -> Number:
    return Number(low, high, real=True, null=True)


TOKEN = Number(-1, null=True)  # -1 stands for none in some files
TOKENS = TOKEN._replace(listed="may")
TOKEN_LIST = TOKEN._replace(listed="must")

GENERATION: dict[str, Field] = {
    **dict.fromkeys(("pad_token_id", "forced_bos_token_id"), TOKEN),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), TOKENS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), TOKEN_LIST),
    **dict.fromkeys(("max_length", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), _count(0)),
    "encoder_no_repeat_ngram_size": _count(0, 10_000),  # a list of that length is made at every step
    **dict.fromkeys(("max_new_tokens", "max_cache_len", "prefill_chunk_size", "max_matching_ngram_size"), _count(1)),
    **dict.fromkeys(("num_assistant_tokens", "prompt_lookup_num_tokens"), _count(1)),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), _count(1)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), _count(1, 10_000)),
    **dict.fromkeys(("temperature", "max_time", "penalty_alpha", "diversity_penalty"), _real(0)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), _real(0)),
    **dict.fromkeys(("length_penalty", "guidance_scale"), _real(-LARGEST_REAL)),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _real(0, 1)),
    "assistant_confidence_threshold": _real(0, 1),
    "assistant_ensemble_weight": _real(1e-6, 1 - 1e-6),
    "early_stopping": Word((False, True, "never", None), "true, false, 'never' or null"),
    "exponential_decay_length_penalty": _real(0)._replace(listed="must", length=2),
}
"""Fields of generation_config.json. config.json may hold them, too."""

THETA = Number(1, 1e15, real=True)
FLAG = Word((False, True), "true or false")
FLAG_OR_NULL = Word((False, True, None), "true, false or null")
ABSENT = Word((False, None, {}, []), "absent: this model does not serve it")
LAYER_TYPES = Word(
    ("full_attention", "sliding_attention", "attention"),  # "attention" is an older name of the first
    "a list of 'full_attention' and 'sliding_attention', one for each layer, or null",
    listed=True,
)
_FLOATING = {
    name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype) and kind.is_floating_point
}
DTYPE = Word((*_FLOATING, *_FLOATING.values(), None), "the name of a floating-point dtype, as 'bfloat16', or null")

CONFIG: dict[str, Field] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), Number(1)),
    "num_hidden_layers": Number(1, 100_000),  # transformers makes a list of that length
    "num_key_value_heads": _count(1),
    "head_dim": _count(1),
    "max_position_embeddings": Number(1),
    "sliding_window": _count(0),  # 0 where a mixture of experts has none
    "max_window_layers": Number(0),
    "rms_norm_eps": Number(1e-30, LARGEST_REAL, real=True),
    "rope_theta": THETA,
    "initializer_range": Number(0, LARGEST_REAL, real=True),
    "attention_dropout": Number(0, 1, real=True),
    "num_labels": _count(0, 100_000),  # transformers makes a dictionary of that size
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "use_sliding_window"), FLAG),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "is_decoder"), FLAG_OR_NULL),
    **dict.fromkeys(("torchscript", "tf_legacy_loss", "use_bfloat16"), FLAG_OR_NULL),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), ABSENT),
    **dict.fromkeys(("per_layer_config", "pruned_heads", "configuration_files"), ABSENT),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    "layer_types": LAYER_TYPES,
    **dict.fromkeys(("id2label", "label2id"), Names()),
    # Of a mixture of experts. What npu_moe_init_routing_v2 and npu_moe_gating_top_k_softmax take.
    "num_experts": Number(1, 10_240),
    "num_experts_per_tok": Number(1, 1024),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), Number(1)),
    "decoder_sparse_step": Number(1, 100_000),
    "mlp_only_layers": Number(0, 100_000, null=True, listed="must"),
    **dict.fromkeys(("norm_topk_prob", "qkv_bias"), FLAG),
    "router_aux_loss_coef": _real(0),
}
"""Fields of config.json."""

ROPE: dict[str, Field] = {
    "rope_theta": THETA,
    "original_max_position_embeddings": Number(1),
    **dict.fromkeys(("factor", "attention_factor", "low_freq_factor", "high_freq_factor"), _real(1e-6)),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _real(0)),  # 0 is the default of all
    "truncate": FLAG,
}
"""What rope_parameters, or rope_scaling, of config.json may hold."""

ROPES = ("rope_parameters", "rope_scaling")
"""Fields of config.json with such settings."""


def check_numbers(values: Mapping[str, Any], table: Mapping[str, Field], *, where: str, way_out: str) -> None:
    """Refuse the first field that holds something else than it takes.

    Raises:
        CheckpointError: naming the field, its value and what it takes.
    """
    for name, number in table.items():
        if name in values and not number.takes(values[name]):
            raise CheckpointError(f"{where}{name}={reprlib.repr(values[name])} must be {number}; {way_out}")


def check_values(values: Mapping[str, Any], *, where: str, way_out: str, spare: bool = False) -> None:
    """Refuse what a configuration cannot hold, whichever version of transformers wrote it.

    Args:
        spare: whether layer_types may list more layers than the model has, as in memory, where that was made smaller.

    Raises:
        CheckpointError: naming the field, its value and what it takes.
    """
    check_numbers(values, GENERATION | CONFIG, where=where, way_out=way_out)
    for name in ROPES:
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict) or any(isinstance(value, (dict, list)) for value in rope.values()):
            raise CheckpointError(
                f"{where}{name}={reprlib.repr(rope)} must be one object of numbers and words, the same for all layers, "
                f"or null; {way_out}"
            )
        check_numbers(rope, ROPE, where=f"{where}{name}: ", way_out=way_out)
    kinds, layers = values.get("layer_types"), values.get("num_hidden_layers")
    if kinds is not None and layers is not None and (len(kinds) < layers or (len(kinds) > layers and not spare)):
        raise CheckpointError(f"{where}layer_types has {len(kinds)} entries for num_hidden_layers={layers}; {way_out}")
