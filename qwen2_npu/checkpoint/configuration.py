"""config.json and generation_config.json of a checkpoint folder, every fault in them named."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig, Qwen2Config

from qwen2_npu.checkpoint.fields import GENERATION, check_numbers, check_values
from qwen2_npu.checkpoint.folders import COMMANDS, SAVING, is_file, is_folder, unreadable
from qwen2_npu.checkpoint.quantization import FIELD, parse, quantization_of
from qwen2_npu.compat import CONFIGURATIONS, check_config, head_dim, in_own_words, kv_head_count, settled
from qwen2_npu.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

DEEPEST = 100
"""Levels of nesting in a JSON file; libraries that walk through more run out of stack."""

PUT_IN = ("pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""Fields of generation_config.json with tokens that ``generate`` puts into a text itself."""

UNSERVED = ("assistant_early_exit", "is_assistant")
"""Fields of generation_config.json for a way to generate that this model does not have."""


def check_fields(config: Qwen2Config) -> None:
    """Refuse values that no model has, and head counts that do not divide.

    Raises:
        CheckpointError: with the values.
    """
    check_values(vars(config), where="", way_out="correct config.json", spare=True)
    heads, kv_heads, hidden = config.num_attention_heads, kv_head_count(config), config.hidden_size
    if heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: every kv head serves the "
            "same number of query heads; correct config.json"
        )
    if getattr(config, "head_dim", None) is None and hidden % heads:
        raise CheckpointError(f"num_attention_heads={heads} does not divide hidden_size={hidden}; correct config.json")
    if head_dim(config) % 2:
        raise CheckpointError(
            f"head_dim={head_dim(config)} (hidden_size / num_attention_heads unless given) is odd, and rotary "
            "positions turn pairs of values; correct config.json"
        )
    for name in PUT_IN:
        if max(_listed(getattr(config, name, None)), default=-1) >= config.vocab_size:
            raise CheckpointError(
                f"{name}={reprlib.repr(getattr(config, name))} is outside the vocabulary of "
                f"vocab_size={config.vocab_size}; correct config.json"
            )


def read_config(folder: Path, **changes: Any) -> Qwen2Config:
    """The folder's config.json as a ``Qwen2Config``, or ``Qwen2MoeConfig``.

    Args:
        changes: fields that take another value than the file gives, as transformers' ``from_pretrained`` takes them.

    Raises:
        CheckpointError: no such folder or file, unreadable, another model_type, weights that are quantised by another
            scheme than those that are served, numbers that no model has.
        UnsupportedError: what this model does not compute.
    """
    if not is_folder(folder):
        raise CheckpointError(
            f"model path {str(folder)!r} is not a folder: pass a local Hugging Face checkpoint folder (nothing is "
            "downloaded; fetch one with `hf download Qwen/Qwen2-7B-Instruct --local-dir DIR`)"
        )
    path = folder / CONFIG_FILE
    if not is_file(path):
        raise _no_config(folder)
    values = read_object(path)
    model_type = values.get("model_type")
    if model_type not in CONFIGURATIONS:
        reason = "this model serves 'qwen2' (Qwen2 dense sizes and Qwen1.5) and 'qwen2_moe'"
        if model_type == "qwen2_moe":
            reason = f"transformers {transformers.__version__} has no such model: pip install transformers==5.24.0"
        raise CheckpointError(f"{path} has model_type={reprlib.repr(model_type)}; {reason}")
    with _in_file(path):
        if parse(values.get(FIELD)) is None:
            values.pop(FIELD, None)  # 4.37.0 asks an empty one for its fields
    # Before transformers: it makes lists of the lengths that are given.
    check_values(values, where=f"{path}: ", way_out="correct it")
    check_values(changes, where=f"{path}: ", way_out="correct it", spare=True)
    try:
        config = CONFIGURATIONS[model_type].from_dict(in_own_words(values), **changes)
        GenerationConfig.from_model_config(config)  # 4.37.0 makes one where there is no file of it
    except Exception as error:  # 5.x validates with exception types of its own
        raise CheckpointError(f"{path} is refused by transformers: {one_line(error)}; correct it") from error
    check_fields(config)
    with _in_file(path):
        quantization_of(config)
    config = settled(config)
    check_config(config)
    return config


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Say which file a fault is in."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _no_config(folder: Path) -> CheckpointError:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        names = []
    reason = "it is no Hugging Face checkpoint folder"
    if any(name.startswith(SAVING) for name in names):
        reason = "a save into it was interrupted, or is under way: save the model again, or wait"
    if (command := next((COMMANDS[name] for name in names if name in COMMANDS), None)) is not None:
        reason = f"qwen2-npu {command} was interrupted, or is under way: run the same command again, or wait"
    return CheckpointError(f"{folder} has no config.json: {reason}")


def read_generation_config(folder: Path, vocab_size: int) -> GenerationConfig | None:
    """The folder's generation_config.json, if it has one.

    Args:
        vocab_size: of the model: tokens that are put into a text belong to it.

    Raises:
        CheckpointError: it cannot be read, or holds numbers that cannot be generated with.
    """
    path = folder / GENERATION_CONFIG_FILE
    if not is_file(path):
        return None
    values = read_object(path)
    check_numbers(values, GENERATION, where=f"{path}: ", way_out="correct it, or delete the file")
    for name in PUT_IN:
        if max(_listed(values.get(name)), default=-1) >= vocab_size:
            raise CheckpointError(
                f"{path}: {name}={reprlib.repr(values[name])} is outside the vocabulary of vocab_size={vocab_size}; "
                "correct it, or delete the file"
            )
    for name in UNSERVED:
        if values.get(name) is not None and values[name] is not False:
            raise CheckpointError(f"{path}: {name}={reprlib.repr(values[name])} is not served by this model; remove it")
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # 5.x validates with exception types of its own
        raise CheckpointError(f"{path} is refused by transformers: {one_line(error)}; correct or delete it") from error


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is none in it, or it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({one_line(error)}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__} in place of a JSON object; fetch it again")
    level: list[Any] = [values]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise CheckpointError(f"{path} is nested more than {DEEPEST} levels deep; fetch it again")
    return values


def one_line(error: BaseException) -> str:
    """What an exception says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
