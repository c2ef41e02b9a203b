"""Every number of config.json and generation_config.json with every kind of value: refused by name, or it works."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import weights
from qwen2_npu.checkpoint.fields import CONFIG, GENERATION, Number, check_values
from qwen2_npu.checkpoint.fields import ROPE as ROPE_TABLE
from qwen2_npu.compat import check_rope
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.small import V4, small_config, small_stock

VALUES: tuple[Any, ...] = (
    "abc", "5", 1.5, True, [1, 2], [], ["a"], {"a": 1}, -1, -7, 0, 1, 2**31 - 1, 10**30, 10**400, None, math.nan,
    math.inf, 1e308,
)  # fmt: skip
"""What may stand in place of a number."""

NO_NUMBERS = {
    "do_sample", "early_stopping", "use_cache", "use_mtp", "cache_implementation", "cache_config", "stop_strings",
    "renormalize_logits", "remove_invalid_values", "sequence_bias", "bad_words_ids", "force_words_ids", "constraints",
    "token_healing", "watermarking_config", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "is_assistant", "assistant_early_exit", "num_assistant_tokens_schedule",
    "speculation_type", "compile_config", "disable_compile", "continuous_batching_config", "low_memory", "dola_layers",
    "generation_kwargs", "forced_decoder_ids", "_commit_hash", "_from_model_config", "transformers_version",
}  # fmt: skip
"""The other fields of a ``GenerationConfig``."""

ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
ROPE_FIELDS = ("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")


def one_layer(**changes: Any) -> Qwen2Config:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32, "vocab_size": 61}
    return small_config(**(sizes | {"eos_token_id": 5} | changes))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin")
    small_stock(one_layer()).save_pretrained(path, safe_serialization=True)
    return path


def check(origin: Path, folder: Path, file: str, name: str, change: dict[str, Any]) -> None:
    """Refused in one line that names file and field; or by transformers' ``generate`` as a ValueError; or it works."""
    values = json.loads((origin / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(values | change), encoding="utf-8")
    try:
        model = Qwen2ForCausalLM.from_pretrained(folder)
    except (CheckpointError, UnsupportedError) as error:
        message = str(error)
        fits = name in message or (name in CONFIG and "does not fit its configuration" in message)
        if "\n" in message or len(message) > 600 or not fits:
            pytest.fail(f"{change}: {message}")
        return
    limit = {} if "max_new_tokens" in change else {"max_new_tokens": 2}
    with warnings.catch_warnings(action="ignore"), suppress(ValueError):
        model.generate(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3), do_sample=True, **limit)


@pytest.fixture
def folder(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "model"))


@pytest.mark.parametrize("name", CONFIG)
def test_config(origin, folder, name):
    for value in VALUES:
        check(origin, folder, "config.json", name, {name: value})


@pytest.mark.parametrize("file", ["generation_config.json", pytest.param("config.json", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GENERATION)
def test_generation_config(origin, folder, file, name):
    if V4 and name == "prompt_lookup_num_tokens":
        pytest.skip("4.37.0's prompt lookup does not work with this model's cache, whatever the number")
    for value in VALUES:
        check(origin, folder, file, name, {name: value})


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_tokens_in_config(origin, folder, name):
    for value in VALUES:
        check(origin, folder, "config.json", name, {name: value})


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["attention_factor", "factor"])
def test_frequencies_that_are_no_numbers(folder, key, name):
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {key: ROPE | {name: math.nan}}))
    with pytest.raises(
        CheckpointError, match=rf"config\.json: {key}: {name}=nan must be a number from .*; correct it$"
    ):
        Qwen2ForCausalLM.from_pretrained(folder)


@pytest.mark.skipif(V4, reason="transformers 4.37.0's model has no rope scaling")
def test_frequencies_that_come_out_as_no_numbers():
    for name in ("attention_factor", "factor"):
        config = small_config(rope_parameters=ROPE | {name: math.nan})
        with pytest.raises(UnsupportedError, match=r"^rope_parameters=\{.*they are not finite\); correct it in config"):
            check_rope(config)


@pytest.mark.skipif(V4, reason="transformers 4.37.0's model has no rope scaling")
@pytest.mark.parametrize("name", ROPE_FIELDS)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_parameters(origin, folder, key, name):
    for value in VALUES:
        check(origin, folder, "config.json", "rope", {"rope_parameters": None, key: ROPE | {name: value}})


NO_MODEL: tuple[tuple[str, Any], ...] = (
    *(("rms_norm_eps", value) for value in (math.nan, math.inf, 0, 0.0, -1e-6, "1e-6", True)),
    *(("rope_theta", value) for value in (math.nan, math.inf, 0, -1e4, "1e6", None, True)),
    *(("max_position_embeddings", value) for value in (10**30, 2**31, 4096.0, True)),
    *(("tie_word_embeddings", value) for value in ("false", 0, None)),
    *(("use_sliding_window", value) for value in ("false", 1, [])),
    *(("layer_types", value) for value in ([], {}, "full_attention", ["full"], ["chunked_attention"], [None], [1])),
    *(("rope_parameters", value) for value in ("yarn", [], {"full_attention": {"rope_theta": 1e4}})),
    *(("rope_parameters", {"rope_type": "default", "rope_theta": value}) for value in (math.nan, "1e6", 0, None)),
    *(("torch_dtype", value) for value in ("bf16", "int8", "nn", 1)),
    *(("hidden_act", value) for value in ("gelu", "silly", None, 1)),
    ("is_encoder_decoder", True),
    ("add_cross_attention", True),
    ("per_layer_config", {"0": {"intermediate_size": 8}}),
    ("pruned_heads", {"0": [1]}),
    ("configuration_files", ["config.5.0.0.json"]),
    ("num_attention_heads", 3),
)
"""Values that computed something else, or ended in an error without a name."""


@pytest.mark.parametrize(("name", "value"), NO_MODEL)
def test_values_that_no_model_has(folder, name, value):
    """In a file, and in a configuration that somebody made, where transformers lets him."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises((CheckpointError, UnsupportedError), match=name) as caught:
        Qwen2ForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    if V4 or name not in ("rope_theta", "torch_dtype"):  # of 4.37.0 alone
        config = one_layer()
        vars(config)[name] = value
        with pytest.raises((CheckpointError, UnsupportedError), match=name):
            Qwen2ForCausalLM(config)


@pytest.mark.parametrize("count", [0, 2])
def test_layer_types_of_another_length(folder, count):
    """In memory more of them than layers are taken, as the stock model takes them."""
    path, kinds = folder / "config.json", ["full_attention"] * count
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"layer_types": kinds}))
    message = rf"layer_types has {count} entries for num_hidden_layers=1; correct"
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM.from_pretrained(folder)
    config = one_layer()
    config.layer_types = kinds
    if count:
        assert len(Qwen2ForCausalLM(config).model.layers) == 1
        return
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM(config)


MEMORY_FIELDS = sorted(
    {name for name in vars(Qwen2Config()) if not name.startswith("_")}
    | set(CONFIG)
    | {"rope_scaling", "rope_parameters"}
)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB, also where there is more."""
    monkeypatch.setattr(weights.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**36))


@pytest.mark.parametrize("name", [name for name in MEMORY_FIELDS if name not in set(GENERATION) | NO_NUMBERS])
@pytest.mark.usefixtures("small_machine")
def test_any_value_in_memory(name):
    """Refused in one line that names the field, or a model comes out: sizes that no memory holds included."""
    for value in (*VALUES, "", False, -math.inf, {}, 2**40):
        config = one_layer()
        vars(config)[name] = value
        try:
            Qwen2ForCausalLM(config)
        except (CheckpointError, UnsupportedError, MemoryError) as error:
            message = str(error)
            if name not in message or "\n" in message or len(message) > 600:
                pytest.fail(f"{name}={value}: {message}")


@pytest.mark.usefixtures("small_machine")
def test_sizes_that_no_memory_holds_are_refused_before_any_is_taken():
    for name in ("vocab_size", "intermediate_size", "num_hidden_layers"):
        config = one_layer()
        setattr(config, name, 100_000 if name == "num_hidden_layers" else 2**31 - 1)
        config.hidden_size, config.layer_types = 8192, ["full_attention"] * config.num_hidden_layers
        with pytest.raises(MemoryError, match=rf"take \d.* TiB, this machine has 64 GiB: correct .*{name}="):
            Qwen2ForCausalLM(config)
    with torch.device("meta"):  # nothing is taken there
        Qwen2ForCausalLM(one_layer(intermediate_size=2**31 - 1))


def test_every_number_of_transformers_is_in_a_table():
    """What the installed version has, so that a new one is met here first."""
    assert set(vars(GenerationConfig())) <= set(GENERATION) | NO_NUMBERS
    numbers = {name for name, value in vars(Qwen2Config()).items() if type(value) in (int, float)}
    assert numbers <= set(CONFIG) | set(GENERATION) | {"chunk_size_feed_forward"}


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
    (ROPE_TABLE, "original_max_position_embeddings", (1, MOST), (0, MOST + 1, None, *NO_INTEGER)),
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
    (ROPE_TABLE, "rope_theta", (1, 1e15), (0.99, 1.01e15, None, *NO_NUMBER)),
    (
        ROPE_TABLE,
        "factor attention_factor low_freq_factor high_freq_factor",
        (1e-6, 1, 1e6, None),
        (0, 9e-7, 1_000_001, *NO_NUMBER),
    ),
    (
        ROPE_TABLE,
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
    (ROPE_TABLE, "truncate", (False, True), (0, 1, None, "no")),
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


@pytest.mark.parametrize("table", [CONFIG, GENERATION, ROPE_TABLE], ids=["config", "generation", "rope"])
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
