"""What each field of config.json and generation_config.json takes: values on both sides of its limits."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from qwen2_npu.checkpoint.fields import CONFIG, GENERATION, ROPE, Number, check_values
from qwen2_npu.errors import CheckpointError


@pytest.mark.parametrize(
    ("number", "taken", "refused", "text"),
    [
        (Number(1), [1, 2**31 - 1], [0, 1.0, True, None, [1]], "an integer from 1 to 2147483647"),
        (Number(0, 1, real=True, null=True), [0, 0.5, None], [-0.1, 1.5, math.nan], "a number from 0 to 1, or null"),
        (
            Number(-1, 9, listed="may"),
            [3, [3, -1]],
            [[], [3, "a"], [[3]], {}],
            "an integer from -1 to 9, or a list of such numbers",
        ),
        (
            Number(0, 9, listed="must", length=2),
            [[1, 2]],
            [1, [], [1], [1, 2, 3]],
            "a list of 2 numbers, each an integer from 0 to 9",
        ),
    ],
)
def test_what_a_number_takes(number, taken, refused, text):
    assert all(number.takes(value) for value in taken)
    assert not any(number.takes(value) for value in refused)
    assert str(number) == text


MOST = 2**31 - 1
NO_INTEGER = (True, 1.0, 1.5, [1])
NO_NUMBER = (True, [1], math.inf)

LIMITS: tuple[tuple[dict[str, Any], str, tuple[Any, ...], tuple[Any, ...]], ...] = (
    # ---- integers
    (
        CONFIG,
        "vocab_size hidden_size intermediate_size num_attention_heads max_position_embeddings moe_intermediate_size "
        "shared_expert_intermediate_size",
        (1, MOST),
        (0, MOST + 1, None, *NO_INTEGER),
    ),
    (CONFIG, "num_key_value_heads head_dim", (1, MOST, None), (0, MOST + 1, *NO_INTEGER)),
    (CONFIG, "sliding_window", (0, MOST, None), (-1, MOST + 1, *NO_INTEGER)),
    (CONFIG, "max_window_layers", (0, MOST), (-1, MOST + 1, None, *NO_INTEGER)),
    (CONFIG, "num_hidden_layers decoder_sparse_step", (1, 100_000), (0, 100_001, None, *NO_INTEGER)),
    (CONFIG, "num_labels", (0, 100_000, None), (-1, 100_001, *NO_INTEGER)),
    (CONFIG, "num_experts", (1, 10_240), (0, 10_241, None, *NO_INTEGER)),
    (CONFIG, "num_experts_per_tok", (1, 1024), (0, 1025, None, *NO_INTEGER)),
    (CONFIG, "mlp_only_layers", ([], [0, 100_000], None), (0, [-1], [100_001], [0, 1.5])),
    (ROPE, "original_max_position_embeddings", (1, MOST), (0, MOST + 1, None, *NO_INTEGER)),
    (GENERATION, "pad_token_id forced_bos_token_id", (-1, MOST, None), (-2, MOST + 1, *NO_INTEGER)),
    (
        GENERATION,
        "bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id",
        (-1, MOST, [-1, MOST], [5], None),
        (-2, MOST + 1, 1.5, True, [], [-2], [5, MOST + 1]),
    ),
    (GENERATION, "suppress_tokens begin_suppress_tokens", ([], [-1, MOST], None), (1, [-2], [5, MOST + 1], [1.5])),
    (
        GENERATION,
        "max_length min_length min_new_tokens top_k no_repeat_ngram_size",
        (0, MOST, None),
        (-1, MOST + 1, *NO_INTEGER),
    ),
    (
        GENERATION,
        "max_new_tokens max_cache_len prefill_chunk_size max_matching_ngram_size num_assistant_tokens "
        "prompt_lookup_num_tokens assistant_lookbehind target_lookbehind",
        (1, MOST, None),
        (0, MOST + 1, *NO_INTEGER),
    ),
    (GENERATION, "encoder_no_repeat_ngram_size", (0, 10_000, None), (-1, 10_001, *NO_INTEGER)),
    (GENERATION, "num_beams num_beam_groups num_return_sequences", (1, 10_000, None), (0, 10_001, *NO_INTEGER)),
    # ---- real numbers
    (CONFIG, "rms_norm_eps", (1e-30, 1, 1e6), (0, 9e-31, 1_000_001, None, *NO_NUMBER)),
    (CONFIG, "rope_theta", (1, 1e15), (0.99, 1.01e15, None, *NO_NUMBER)),
    (CONFIG, "initializer_range", (0, 0.02, 1e6), (-1e-9, 1_000_001, None, *NO_NUMBER)),
    (CONFIG, "attention_dropout", (0, 0.1, 1), (-1e-9, 1.01, None, *NO_NUMBER)),
    (CONFIG, "router_aux_loss_coef", (0, 0.1, 1e6, None), (-1e-9, 1_000_001, *NO_NUMBER)),
    (ROPE, "rope_theta", (1, 1e15), (0.99, 1.01e15, None, *NO_NUMBER)),
    (
        ROPE,
        "factor attention_factor low_freq_factor high_freq_factor",
        (1e-6, 1, 1e6, None),
        (0, 9e-7, 1_000_001, *NO_NUMBER),
    ),
    (
        ROPE,
        "beta_fast beta_slow mscale mscale_all_dim",
        (0, 0.5, 1e6, None),
        (-1e-9, 1_000_001, *NO_NUMBER),
    ),
    (
        GENERATION,
        "temperature max_time penalty_alpha diversity_penalty repetition_penalty encoder_repetition_penalty",
        (0, 0.5, 1e6, None),
        (-1e-9, 1_000_001, *NO_NUMBER),
    ),
    (GENERATION, "length_penalty guidance_scale", (-1e6, 0.5, 1e6, None), (-1_000_001, 1_000_001, *NO_NUMBER)),
    (
        GENERATION,
        "top_p min_p top_h typical_p epsilon_cutoff eta_cutoff assistant_confidence_threshold",
        (0, 0.5, 1, None),
        (-1e-9, 1.01, *NO_NUMBER),
    ),
    (GENERATION, "assistant_ensemble_weight", (1e-6, 1 - 1e-6, None), (0, 9e-7, 1 - 9e-7, 1, *NO_NUMBER)),
    (
        GENERATION,
        "exponential_decay_length_penalty",
        ([0, 1e6], [1, 1.01], None),
        (1, [], [1], [1, 2, 3], [-1e-9, 2], [1, 1_000_001]),
    ),
    # ---- words and objects
    (
        CONFIG,
        "use_cache tie_word_embeddings use_sliding_window norm_topk_prob qkv_bias",
        (False, True),
        (0, 1, None, "true", []),
    ),
    (ROPE, "truncate", (False, True), (0, 1, None, "no")),
    (
        CONFIG,
        "output_attentions output_hidden_states return_dict is_decoder torchscript tf_legacy_loss use_bfloat16",
        (False, True, None),
        (0, 1, "true", []),
    ),
    (
        CONFIG,
        "is_encoder_decoder add_cross_attention tie_encoder_decoder per_layer_config pruned_heads configuration_files",
        (False, None, {}, []),
        (True, 0, "", {"0": [1]}, ["config.5.0.0.json"]),
    ),
    (
        CONFIG,
        "dtype torch_dtype",
        ("bfloat16", "float16", "float32", torch.bfloat16, None),
        ("bf16", "int8", torch.int8, "nn", 1, ["bfloat16"]),
    ),
    (
        CONFIG,
        "layer_types",
        ([], ["full_attention"], ["sliding_attention"], ["attention", "full_attention"], None),
        ("", {}, "full_attention", ["other"], ["full_attention", "other"], [1], [None]),
    ),
    (CONFIG, "id2label label2id", ({}, {"0": "a"}, None), ([], "", 0, False)),
    (GENERATION, "early_stopping", (False, True, "never", None), (0, 1, "always", "", [])),
)
"""Fields by the values that they take and those that they refuse, just inside and just outside of their limits."""


@pytest.mark.parametrize(("table", "names", "taken", "refused"), LIMITS)
def test_the_least_and_the_most_of_a_field(table, names, taken, refused):
    for name in names.split():
        assert [value for value in taken if not table[name].takes(value)] == [], name
        assert [value for value in (*refused, "abc", math.nan) if table[name].takes(value)] == [], name


@pytest.mark.parametrize("table", [CONFIG, GENERATION, ROPE], ids=["config", "generation", "rope"])
def test_every_field_of_the_tables_has_its_limits_here(table):
    """Else a field could be left out, or take anything, and no test would tell."""
    assert sorted(table) == sorted(name for of, names, _, _ in LIMITS if of is table for name in names.split())


@pytest.mark.parametrize("inner", [{"rope_theta": 1e4, "full_attention": {"rope_theta": 1e4}}, {"factor": [1.0, 2.0]}])
def test_rotary_settings_of_single_layers(inner):
    with pytest.raises(CheckpointError, match="the same for all layers"):
        check_values({"rope_parameters": inner}, where="", way_out="correct it")


@pytest.mark.parametrize("spare", [False, True])
def test_more_layer_types_than_layers_are_taken_in_memory_alone(spare):
    values = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 1}
    with nullcontext() if spare else pytest.raises(CheckpointError, match="has 2 entries"):
        check_values(values, where="", way_out="correct it", spare=spare)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be an integer from 1 to 2147483647"),
        ({"vocab_size": 1, "router_aux_loss_coef": "a"}, "router_aux_loss_coef='a' must be a number from 0 to 1000000"),
        ({"pad_token_id": -2}, "pad_token_id=-2 must be an integer from -1 to 2147483647, or null"),
        ({"suppress_tokens": 1}, "suppress_tokens=1 must be a list of numbers, each an integer from -1 to"),
        ({"use_cache": 1}, "use_cache=1 must be true or false"),
        ({"id2label": 1}, "id2label=1 must be an object, or null"),
        (
            {"rope_parameters": {"factor": 0}},
            "rope_parameters: factor=0 must be a number from 1e-06 to 1000000, or null",
        ),
        ({"rope_parameters": None, "rope_scaling": {"truncate": 1}}, "rope_scaling: truncate=1 must be true or false"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be one object of numbers and words"),
        ({"rope_scaling": []}, r"rope_scaling=\[\] must be one object of numbers and words"),
        (
            {"layer_types": ["attention"] * 2, "num_hidden_layers": 1},
            "layer_types has 2 entries for num_hidden_layers=1",
        ),
        ({"layer_types": [], "num_hidden_layers": 1}, "layer_types has 0 entries for num_hidden_layers=1"),
    ],
    ids=str,
)
def test_the_field_its_value_and_the_way_out_are_named(values, message):
    with pytest.raises(CheckpointError, match=rf"^x: {message}.*; correct it$"):
        check_values(values, where="x: ", way_out="correct it")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"another_field": "abc"},
        {"layer_types": ["attention"]},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 3, "layer_types": None},
        {"num_hidden_layers": 3, "layer_types": ["attention"] * 3},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4}, "rope_scaling": {}},
        {"rope_parameters": None, "rope_scaling": None},
    ],
    ids=str,
)
def test_values_that_are_taken(values):
    check_values(values, where="", way_out="correct it")


def test_fewer_layer_types_than_layers_are_refused_in_memory_too():
    with pytest.raises(CheckpointError, match="has 1 entries for num_hidden_layers=2"):
        check_values({"layer_types": ["attention"], "num_hidden_layers": 2}, where="", way_out="correct it", spare=True)
