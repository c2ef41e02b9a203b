"""Every number of config.json and generation_config.json with every kind of value: refused by name, or it works."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import weights
from qwen2_npu.checkpoint.fields import CONFIG, GENERATION
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
