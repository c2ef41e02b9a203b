"""Hugging Face folders in and out: weights fused while they are read, unfused while they are written.

The one fact both directions share is :data:`FUSED`: which stock tensors stand, in which order, in one fused parameter.
A stock tensor is read into its rows of the parameter, and saved as those rows: never two copies in memory, and
bit-identical.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config

from qwen2_npu.compat import kv_head_count
from qwen2_npu.errors import CheckpointError, UnsupportedError

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused module -> the stock modules whose rows it stacks, in this order."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


class Rows(NamedTuple):
    """Where a stock tensor lives: rows ``[start, start + shape[0])`` of a parameter of this model."""

    parameter: str
    start: int
    shape: tuple[int, ...]


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
    """Refuse head counts that do not divide.

    Raises:
        CheckpointError: with the values.
    """
    heads, kv_heads, hidden = config.num_attention_heads, kv_head_count(config), config.hidden_size
    if kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: every kv head serves "
            "the same number "
            f"of query heads; correct config.json"
        )
    if getattr(config, "head_dim", None) is None and hidden % heads:
        raise CheckpointError(f"num_attention_heads={heads} does not divide hidden_size={hidden}; correct config.json")


def read_config(folder: Path) -> Qwen2Config:
    """The folder's config.json as a ``Qwen2Config``.

    Raises:
        CheckpointError: no such folder or file, unreadable, another model_type, quantised weights, heads that do not
            divide.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"model path {str(folder)!r} is no folder: pass a local Hugging Face checkpoint folder (nothing is "
            "downloaded; "
            f"fetch one with `hf download Qwen/Qwen2-7B-Instruct --local-dir DIR`)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no Hugging Face checkpoint folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}); fetch it again") from error
    model_type = values.get("model_type")
    if model_type != "qwen2":
        raise CheckpointError(
            f"{path} has model_type={model_type!r}; this model serves 'qwen2' (Qwen2 dense sizes and Qwen1.5)"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise CheckpointError(
            f"{path} describes weights quantised with {method!r}; use the checkpoint in bf16, fp16 or fp32"
        )
    try:
        config = Qwen2Config.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # 5.x validates with exception types of its own
        raise CheckpointError(f"{path} is refused by transformers: {error}") from error
    check_heads(config)
    return config


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
    """Stock tensors already in memory."""

    def __init__(self, config: Qwen2Config, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self._state_dict = state_dict

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state_dict.items()}

    def stored_dtype(self) -> torch.dtype:
        return next(iter(self._state_dict.values())).dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._state_dict.items()


class SafetensorsSource:
    """A folder of one or several safetensors shards."""

    def __init__(self, folder: Path, config: Qwen2Config) -> None:
        self.folder = folder
        self.config = config
        self._files: dict[str, list[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtype: torch.dtype | None = None
        for file in _shard_files(folder):
            with _reading(folder / file) as shard:
                self._files[file] = list(shard.keys())
                for name in shard.keys():  # noqa: SIM118 - no mapping
                    self._shapes[name] = tuple(shard.get_slice(name).get_shape())
                if self._dtype is None and self._files[file]:
                    self._dtype = shard.get_tensor(self._files[file][0]).dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored_dtype(self) -> torch.dtype:
        return self._dtype or torch.float32

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, names in self._files.items():
            with _reading(self.folder / file) as shard:
                for name in names:
                    yield name, shard.get_tensor(name)

    def generation_config(self) -> GenerationConfig | None:
        return read_generation_config(self.folder)


class PickledSource(StateDictSource):
    """One pytorch_model.bin, read by name only and with ``weights_only=True``: no code in it is run."""

    def __init__(self, folder: Path, config: Qwen2Config, file: str) -> None:
        self.folder = folder
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"weights_file={file!r}: {path} does not exist")
        try:
            state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a torch state dict: {error}") from error
        super().__init__(config, state_dict)

    def generation_config(self) -> GenerationConfig | None:
        return read_generation_config(self.folder)


def open_checkpoint(
    path: str | Path, *, config: Qwen2Config | None = None, weights_file: str | None = None
) -> SafetensorsSource | PickledSource:
    """Look at a checkpoint folder: configuration and tensor shapes, no weights yet.

    Raises:
        CheckpointError: what is wrong with it.
    """
    folder = Path(path).expanduser()
    config = read_config(folder) if config is None else config
    if weights_file is not None and not weights_file.endswith(".safetensors"):
        return PickledSource(folder, config, weights_file)
    return SafetensorsSource(folder, config)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The folder's generation_config.json, if it has one."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _shard_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        pickled = [name for name in PICKLED if (folder / name).is_file()]
        hint = f"; it has {pickled[0]}: pass weights_file={PICKLED[0]!r} to read pickled weights" if pickled else ""
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no valid index ({error!r}); fetch it again") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shards named by {index} are missing, first {missing[0]}; fetch the rest"
        )
    return files


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({error}); fetch this file again"
        ) from error


# ---- stock tensors <-> parameters -----------------------------------------------------------------------------------
def stock_layout(model: PreTrainedModel) -> dict[str, Rows]:
    """Every stock tensor name with the rows it has in ``model``; a tied lm_head is no tensor of its own."""
    layout: dict[str, Rows] = {}
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if tied and name == "lm_head.weight":
            continue
        *scope, module, kind = name.split(".")
        start = 0
        for part, rows in _parts(model, module, parameter):
            layout[".".join([*scope, part, kind])] = Rows(name, start, (rows, *parameter.shape[1:]))
            start += rows
    return layout


def _parts(model: PreTrainedModel, module: str, parameter: torch.Tensor) -> list[tuple[str, int]]:
    """The stock modules in one parameter with their rows."""
    parts = FUSED.get(module, (module,))
    if module == "qkv_proj":
        return list(zip(parts, model.model.layers[0].self_attn.widths, strict=True))
    return [(part, parameter.shape[0] // len(parts)) for part in parts]


def build(factory: Callable[[], ModelT], source: Source, *, dtype: torch.dtype | None, device: torch.device) -> ModelT:
    """Make the model and read its weights, one tensor at a time.

    Args:
        factory: makes the model; called on the meta device, so that nothing is allocated twice.
        dtype: of the weights in memory; None for what they are stored in.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors; found before anything is read.
    """
    with torch.device("meta"):
        model = factory()
    layout = stock_layout(model)
    _check_shapes(layout, source, model.config.tie_word_embeddings)
    dtype = dtype or source.stored_dtype()
    _materialise(model, dtype, device)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in source.tensors():
        if name in layout:
            parameter, start, shape = layout[name]
            parameters[parameter].data.narrow(0, start, shape[0]).copy_(tensor)
    return model.eval()


def _materialise(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _check_shapes(layout: Mapping[str, Rows], source: Source, tied: bool) -> None:
    found = source.shapes()
    missing = sorted(set(layout) - set(found))
    extra = sorted(name for name in set(found) - set(layout) if not _ignorable(name, tied))
    wrong = [
        f"{name} has shape {found[name]}, expected {rows.shape}"
        for name, rows in layout.items()
        if name in found and found[name] != rows.shape
    ]
    problems = [
        f"{len(items)} {kind}, first {items[0]}"
        for kind, items in (("tensors missing", missing), ("tensors unexpected", extra), ("tensors mis-shaped", wrong))
        if items
    ]
    if problems:
        where = getattr(source, "folder", "the state dict")
        raise CheckpointError(f"{where} does not fit its configuration: {'; '.join(problems)}")


def _ignorable(name: str, tied: bool) -> bool:
    # Old checkpoints carry the rotary frequencies, and some a copy of a tied head.
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def stock_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights under stock names, as views."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: parameters[rows.parameter].data.narrow(0, rows.start, rows.shape[0])
        for name, rows in stock_layout(model).items()
    }


# ---- saving
# -----------------------------------------------------------------------------------------------------------
def save(model: PreTrainedModel, folder: Path, *, max_shard_size: int | str) -> None:
    """Write config, generation config and shards beside their place, then move them in; see ``save_pretrained``."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state_dict = stock_state_dict(model)
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state_dict.items()}
    plan = split_torch_state_dict_into_shards(
        sizes, max_shard_size=max_shard_size, filename_pattern="model{suffix}.safetensors"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            staging = Path(name)
            for file, names in plan.filename_to_tensors.items():
                tensors = {name: state_dict[name].to("cpu").contiguous() for name in names}
                save_file(tensors, staging / file, metadata={"format": "pt"})
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(staging)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(staging)
            _move_in(staging, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save the checkpoint to {folder}: {error}; what was there is unchanged. Free space or "
            "choose another folder"
        ) from error


def _move_in(staging: Path, folder: Path) -> None:
    """Move finished files in, then drop weight files that the new checkpoint does not have: readers would prefer
    them."""
    written = {path.name for path in staging.iterdir()}
    for path in sorted(staging.iterdir()):
        os.replace(path, folder / path.name)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if stale.name not in written:
            stale.unlink(missing_ok=True)
