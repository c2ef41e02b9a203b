"""config.json and generation_config.json that are no JSON, or are not what they should be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint.configuration import check_fields, one_line, read_config, read_generation_config, read_object
from qwen2_npu.errors import CheckpointError
from tests.unit.small import small_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_config().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# ---- JSON -----------------------------------------------------------------------------------------------------------
def nested(levels: int) -> str:
    return '{"a": [' * (levels // 2) + "]}" * (levels // 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not valid JSON \(Expecting value"),
        ('{"a": 1', r"is not valid JSON \("),
        ('{"a": ' + "9" * 5000 + "}", r"is not valid JSON \(Exceeds the limit"),
        ("\x00", r"is not valid JSON \("),
        ("7", r"holds a int in place of a JSON object"),
        (nested(100_000), r"is not valid JSON \(maximum recursion depth exceeded"),
        (nested(400), r"is nested more than 100 levels deep"),
    ],
    ids=["empty", "cut", "digits", "zeros", "number", "deep", "deeper_than_copies_go"],
)
def test_no_object(folder, text, message):
    for name, read in (
        ("config.json", read_config),
        ("generation_config.json", lambda folder: read_generation_config(folder, 9)),
        ("model.safetensors.index.json", lambda folder: Qwen2ForCausalLM.from_pretrained(folder)),
    ):
        path = folder / name
        before = path.read_bytes() if path.exists() else b"{}"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"{name} {message}.*; fetch it again$") as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        path.write_bytes(before)


def test_a_file_in_another_encoding(folder):
    (folder / "config.json").write_bytes('{"a": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON \('utf-8' codec can't decode"):
        read_config(folder)


def test_nesting_that_occurs(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(nested(98), encoding="utf-8")
    assert read_object(path)


# ---- folders --------------------------------------------------------------------------------------------------------
def test_a_folder_that_a_save_left_unfinished(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json: it is no Hugging Face checkpoint folder$"):
        read_config(folder)
    (folder / ".saving-1a2b3c4d").mkdir()
    with pytest.raises(
        CheckpointError, match=r"no config\.json: a save into it was interrupted, or is under way: save"
    ):
        read_config(folder)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (
            [f".saving-{number:08x}" for number in range(8)],
            "a save into it was interrupted, or is under way: save the model again, or wait",
        ),
        ([".merging-qkv.json"], "qwen2-npu merge-qkv was interrupted, or is under way: run the same command again"),
        ([".quantizing.json"], "qwen2-npu quantize was interrupted, or is under way: run the same command again"),
    ],
    ids=["save", "merge-qkv", "quantize"],
)
def test_what_was_interrupted_is_seen_among_other_files(tmp_path, marks, message):
    """Wherever it is in the order that a folder has of its own, which is another one for each name."""
    others = [f"{kind}{number}" for number in range(5) for kind in (".git", "README", "model-", "~")]
    for mark in marks:
        folder = tmp_path / f"with {mark}"
        folder.mkdir()
        for name in [*others[:10], mark, *others[10:]]:
            (folder / name).touch()
        with pytest.raises(CheckpointError, match=rf"has no config\.json: {re.escape(message)}"):
            read_config(folder)


@pytest.mark.parametrize("name", ["", "nowhere", "config.json", "no\0name", "x" * 300])
def test_no_folder(folder, name):
    if not name:
        read_config(folder / name)
        return
    with pytest.raises(CheckpointError, match=r"is not a folder: pass a local|cannot be read: File name too long"):
        read_config(folder / name)


# ---- what the fields say --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_key_value_heads=2 does not divide num_attention_heads=3"),
        ({"hidden_size": 255}, "num_attention_heads=4 does not divide hidden_size=255"),
        ({"hidden_size": 252}, "head_dim=63 .* is odd"),
        ({"pad_token_id": 199}, "pad_token_id=199 is outside the vocabulary of vocab_size=199"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be an integer from 1 to 100000"),
    ],
)
def test_fields_that_do_not_fit_each_other(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


@pytest.mark.parametrize("absent", [None, {}, "", False])
def test_an_empty_field_of_quantisation_says_nothing(folder, absent):
    """Not to transformers either, which in 4.37.0 asks it for its fields."""
    edit(folder, quantization_config=absent)
    config = read_config(folder)
    assert not getattr(config, "quantization_config", None)
    config.save_pretrained(folder)
    assert read_config(folder).to_dict() == config.to_dict()


def test_changes_by_keyword_are_checked_as_the_file_is(folder):
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000000 must be an integer"):
        read_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="vocab_size='abc' must be an integer"):
        read_config(folder, vocab_size="abc")


def test_a_configuration_in_memory_is_checked_too():
    config = small_config()
    config.num_attention_heads = 0
    with pytest.raises(CheckpointError, match="num_attention_heads=0 must be an integer from 1 to"):
        check_fields(config)


@pytest.mark.parametrize("name", ["pad_token_id", "forced_eos_token_id", "forced_bos_token_id"])
def test_tokens_that_generate_puts_in_are_in_the_vocabulary(folder, name):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({name: 199}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{name}=199 is outside the vocabulary of vocab_size=199"):
        read_generation_config(folder, 199)
    assert getattr(read_generation_config(folder, 200), name) == 199


def test_each_of_several_tokens_is_in_the_vocabulary(folder):
    path = folder / "generation_config.json"
    for tokens in ([1, 199], [199, 1]):
        path.write_text(json.dumps({"forced_eos_token_id": tokens}), encoding="utf-8")
        message = f"forced_eos_token_id={tokens} is outside the vocabulary of vocab_size=199"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read_generation_config(folder, 199)
        config = small_config()
        config.forced_eos_token_id = tokens  # 4.37.0 takes it from config.json, 5.x does not
        with pytest.raises(CheckpointError, match=re.escape(message)):
            check_fields(config)


def test_an_exception_in_one_line():
    assert one_line(ValueError("a\n  b\tc ")) == "a b c"
    assert one_line(ValueError()) == one_line(ValueError("\n")) == "ValueError"


@pytest.mark.parametrize("change", [{"assistant_early_exit": 2}, {"is_assistant": True}])
def test_ways_to_generate_that_there_are_not(folder, change):
    (folder / "generation_config.json").write_text(json.dumps(change), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not served by this model; remove it"):
        read_generation_config(folder, 199)


@pytest.mark.parametrize("name", ["assistant_early_exit", "is_assistant"])
@pytest.mark.parametrize("value", [None, False])
def test_ways_to_generate_that_there_are_not_may_be_turned_off(folder, name, value):
    """As transformers writes them."""
    (folder / "generation_config.json").write_text(json.dumps({name: value, "top_k": 7}), encoding="utf-8")
    config = read_generation_config(folder, 199)
    assert config is not None
    assert config.top_k == 7


@pytest.mark.parametrize(("before", "after"), [('{"a": ', "}"), ("[", "]"), ("[[], ", "]"), ('{"b": [], "a": ', "}")])
def test_objects_and_lists_that_nest_too_deep(tmp_path, before, after):
    path = tmp_path / "x.json"
    path.write_text('{"a": ' + before * 200 + "1" + after * 200 + "}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="nested more than 100 levels deep"):
        read_object(path)
