"""Where stock tensors and their configuration come from: a Hugging Face folder, or memory. No weights are read before
they are asked for, one at a time.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, Qwen2Config

from qwen2_npu.compat import kv_head_count
from qwen2_npu.errors import CheckpointError, UnsupportedError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

STORED: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
"""safetensors' names of the same dtypes. What is stored otherwise is quantised."""

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Fields of a configuration that are whole numbers from 1 on."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Source(Protocol):
    """Where stock tensors come from."""

    config: Qwen2Config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor and its shape, without reading data."""

    def stored_dtype(self) -> torch.dtype:
        """What the weights are stored in."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, one at a time."""


# ---- configuration ------------------------------------------------------------------------------------------------
def check_heads(config: Qwen2Config) -> None:
    """Refuse sizes that are none, and head counts that do not divide.

    Raises:
        CheckpointError: with the values.
    """
    for name in POSITIVE:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name}={value!r} is no whole number from 1 on; correct config.json")
    heads, kv_heads, hidden = config.num_attention_heads, kv_head_count(config), config.hidden_size
    if kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: every kv head serves the "
            "same number of query heads; correct config.json"
        )
    if getattr(config, "head_dim", None) is None and hidden % heads:
        raise CheckpointError(f"num_attention_heads={heads} does not divide hidden_size={hidden}; correct config.json")


def read_config(folder: Path, **changes: Any) -> Qwen2Config:
    """The folder's config.json as a ``Qwen2Config``.

    Args:
        changes: fields that take another value than the file gives, as transformers' ``from_pretrained`` takes them.

    Raises:
        CheckpointError: no such folder or file, unreadable, another model_type, quantised weights, heads that do not
            divide.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"model path {str(folder)!r} is no folder: pass a local Hugging Face checkpoint folder (nothing is "
            "downloaded; fetch one with `hf download Qwen/Qwen2-7B-Instruct --local-dir DIR`)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no Hugging Face checkpoint folder")
    values = _read_object(path)
    model_type = values.get("model_type")
    if model_type != "qwen2":
        raise CheckpointError(
            f"{path} has model_type={model_type!r}; this model serves 'qwen2' (Qwen2 dense sizes and Qwen1.5)"
        )
    quantized = values.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{path} describes weights quantised with {method!r}; use the checkpoint in bf16, fp16 or fp32"
        )
    try:
        config = Qwen2Config.from_pretrained(folder, local_files_only=True, **changes)
    except Exception as error:  # 5.x validates with exception types of its own
        raise CheckpointError(f"{path} is refused by transformers: {_one_line(error)}; correct it") from error
    check_heads(config)
    return config


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is none in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__} in place of a JSON object; fetch it again")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by name or itself; None for "auto" and None.

    Raises:
        UnsupportedError: no floating dtype of that name.
    """
    if dtype is None or dtype == "auto":
        return None
    parsed = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if parsed not in DTYPES.values():
        raise UnsupportedError(f"dtype={dtype!r}; supported are {', '.join(DTYPES)} and 'auto'")
    return parsed


# ---- sources --------------------------------------------------------------------------------------------------------
class StateDictSource:
    """Stock tensors already in memory.

    Raises:
        CheckpointError: something in ``state_dict`` is no tensor of floating-point numbers.
    """

    def __init__(
        self, config: Qwen2Config, state_dict: Mapping[str, torch.Tensor], *, where: str = "the state dict"
    ) -> None:
        self.config = config
        self.where = where
        self._state_dict = state_dict
        for name, tensor in state_dict.items():
            stored = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            if stored not in DTYPES.values():
                raise _not_floating(where, name, stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state_dict.items()}

    def stored_dtype(self) -> torch.dtype:
        return next((tensor.dtype for tensor in self._state_dict.values()), torch.float32)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._state_dict.items()


class SafetensorsSource:
    """One or several safetensors files of a folder."""

    def __init__(self, folder: Path, config: Qwen2Config, files: Sequence[str]) -> None:
        self.config = config
        self.where = str(folder)
        self._folder = folder
        self._files: dict[str, list[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtype: torch.dtype | None = None
        for file in files:
            with _reading(folder / file) as shard:
                self._files[file] = list(shard.keys())
                for name in self._files[file]:
                    tensor = shard.get_slice(name)
                    dtype = STORED.get(tensor.get_dtype())
                    if dtype is None:
                        raise _not_floating(folder / file, name, tensor.get_dtype())
                    self._dtype = self._dtype or dtype
                    self._shapes[name] = tuple(tensor.get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored_dtype(self) -> torch.dtype:
        return self._dtype or torch.float32

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, names in self._files.items():
            with _reading(self._folder / file) as shard:
                for name in names:
                    yield name, shard.get_tensor(name)


def open_checkpoint(
    path: str | Path, *, config: Qwen2Config | None = None, weights_file: str | None = None
) -> SafetensorsSource | StateDictSource:
    """Look at a checkpoint folder: configuration and tensor shapes, no weights yet.

    Args:
        weights_file: a file of weights in the folder, or an index of several; default: the safetensors ones. Pickled
            files are read by name only, with ``weights_only=True``: no code in them is run.

    Raises:
        CheckpointError: what is wrong with it.
    """
    folder = Path(path).expanduser()
    config = read_config(folder) if config is None else config
    name = _default_weights(folder) if weights_file is None else weights_file
    if not (folder / name).is_file():
        raise CheckpointError(f"weights_file={name!r}: {folder / name} does not exist; name a file of that folder")
    files = _indexed_files(folder / name) if name.endswith(".index.json") else [name]
    if all(file.endswith(".safetensors") for file in files):
        return SafetensorsSource(folder, config, files)
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= _unpickled(folder / file)
    return StateDictSource(config, state_dict, where=str(folder))


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The folder's generation_config.json, if it has one.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    _read_object(path)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # 5.x validates with exception types of its own
        raise CheckpointError(f"{path} is refused by transformers: {_one_line(error)}; correct or delete it") from error


def _default_weights(folder: Path) -> str:
    for name in (INDEX_FILE, SINGLE_FILE):
        if (folder / name).is_file():
            return name
    pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
    hint = (
        "; fetch them again"
        if pickled is None
        else f"; it has {pickled}, and pickled weights are read by name only: pass weights_file={pickled!r}, or write "
        'them as safetensors once with `python -c "from qwen2_npu import Qwen2ForCausalLM as M; '
        f'M.from_pretrained({str(folder)!r}, weights_file={pickled!r}).save_pretrained({str(folder)!r})"`'
    )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _indexed_files(index: Path) -> list[str]:
    """The files that an index of weights names.

    Raises:
        CheckpointError: it names none, or missing ones.
    """
    weight_map = _read_object(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not named or not all(isinstance(file, str) for file in named):
        raise CheckpointError(
            f"{index} is no valid index: weight_map={reprlib.repr(weight_map)} is no object of tensor and file names; "
            "fetch it again"
        )
    files = sorted(set(named))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shards named by {index} are missing, first {missing[0]}; fetch the rest"
        )
    return files


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch state dict: {_one_line(error)}; fetch it again"
        ) from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path} holds a {type(state_dict).__name__} in place of a state dict; fetch it again")
    return state_dict


def _not_floating(where: str | Path, name: str, stored: object) -> CheckpointError:
    return CheckpointError(
        f"{where}: {name} is stored as {stored}, which is quantised or no weight; use the checkpoint in bf16, fp16 or "
        "fp32"
    )


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({error}); fetch this file again"
        ) from error
