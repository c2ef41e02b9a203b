"""Hugging Face folders in and out: weights fused while they are read, unfused while they are written.

The one fact both directions share is :data:`FUSED`: which stock tensors stand, in which order, in one fused parameter.
A stock tensor is read into its rows of the parameter, and saved as those rows: never two copies in memory, and
bit-identical.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qwen2_npu.errors import CheckpointError
from qwen2_npu.sources import INDEX_FILE, Source

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused module -> the stock modules whose rows it stacks, in this order."""

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


class Rows(NamedTuple):
    """Where a stock tensor lives: rows ``[start, start + shape[0])`` of a parameter of this model."""

    parameter: str
    start: int
    shape: tuple[int, ...]


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


def skeleton(factory: Callable[[], ModelT], source: Source) -> ModelT:
    """The model without weights, on the meta device, where those of ``source`` fit it.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors.
    """
    with torch.device("meta"):
        model = factory()
    _check_shapes(stock_layout(model), source, model.config.tie_word_embeddings)
    return model


def build(factory: Callable[[], ModelT], source: Source, *, dtype: torch.dtype | None, device: torch.device) -> ModelT:
    """Make the model and read its weights, one tensor at a time.

    Args:
        factory: makes the model; called on the meta device, so that nothing is allocated twice.
        dtype: of the weights in memory; None for what they are stored in.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors; found before anything is read.
    """
    model = skeleton(factory, source)
    layout = stock_layout(model)
    _materialise(model, dtype or source.stored_dtype(), device)
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
        where = getattr(source, "where", type(source).__name__)
        raise CheckpointError(
            f"{where} does not fit its configuration: {'; '.join(problems)}; fetch it again, or correct config.json"
        )


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


# ---- saving ---------------------------------------------------------------------------------------------------------
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
