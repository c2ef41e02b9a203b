"""Hugging Face folders in and out: weights fused while they are read, unfused while they are written.

The one fact both directions share is :data:`FUSED`: which stock tensors stand, in which order, in one fused parameter.
A stock tensor is read into its rows of the parameter, and saved as those rows: never two copies in memory, and
bit-identical.
"""

from __future__ import annotations

import copy
import errno
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qwen2_npu.cache import human_bytes
from qwen2_npu.checkpoint import merged
from qwen2_npu.checkpoint.configuration import check_fields
from qwen2_npu.checkpoint.naming import EMBEDDING, HEAD
from qwen2_npu.checkpoint.quantization import FIELD, quantization_of
from qwen2_npu.checkpoint.quantized import Dequantized, scale_in, stored_sizes, stored_tensor
from qwen2_npu.checkpoint.saving import NotRestoredError, replace_checkpoint
from qwen2_npu.checkpoint.shards import INDEX_FILE
from qwen2_npu.checkpoint.sources import Source, check_dtype
from qwen2_npu.compat import (
    WEIGHTS_FIELD,
    check_rope,
    expert_count,
    head_dim,
    is_sparse,
    kv_head_count,
    readable_by_both,
)
from qwen2_npu.errors import CheckpointError
from qwen2_npu.ops.grouped_matmul import empty_weight
from qwen2_npu.parallel.sharding import OF_SCALE, Cutting, Shard

FUSED: dict[str, tuple[str, ...]] = {
    merged.MODULE: merged.PARTS,
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused module -> the stock modules whose rows it stacks, in this order."""

EXPERTS = "experts"
"""The module whose parameters hold one matrix per expert."""

NETWORK = "model."
"""What the names of the network's tensors begin with."""

CAUSAL_LM = (HEAD,)
"""The parameters of a model's head: see :func:`head_shapes` for those that there are."""

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


class StackedRows(NamedTuple):
    """Where a stock tensor lives: rows ``[start, start + shape[0])`` of a parameter of this model; of an expert, the
    columns of its matrix, which stands transposed, as grouped products take it.

    Attributes:
        shape: of the stock tensor.
        expert: the matrix of (experts, K, N) that it is in; None for a parameter of all tokens.
    """

    parameter: str
    start: int
    shape: tuple[int, ...]
    expert: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The stock tensor as a view of ``parameter``."""
        if self.expert is None:
            return parameter.narrow(0, self.start, self.shape[0])
        return parameter[self.expert].narrow(1, self.start, self.shape[0]).t()


# ---- stock tensors <-> parameters -----------------------------------------------------------------------------------
def head_shapes(config: Any, head: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The tensors of a head with their shapes; a tied lm_head is not a tensor of its own."""
    hidden = config.hidden_size
    if head == CAUSAL_LM:
        return {} if config.tie_word_embeddings else {HEAD: (config.vocab_size, hidden)}
    labels = config.num_labels
    known: dict[str, tuple[int, ...]] = {"score.weight": (labels, hidden), "score.bias": (labels,)}
    return {name: known[name] for name in head}


def stock_shapes(config: Any, head: Sequence[str] = CAUSAL_LM) -> dict[str, tuple[int, ...]]:
    """Every stock tensor of a model with its shape; of a checkpoint with 8-bit weights, the scales of those as well."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = (heads * head_dim(config) for heads in (config.num_attention_heads, kv_head_count(config)))
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    dense = _mlp_shapes("mlp.", hidden, intermediate)
    sparse = _sparse_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        mlp = sparse if is_sparse(config, index) else dense
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in (layer | mlp).items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes | head_shapes(config, head) | _scale_shapes(config, shapes)


def _scale_shapes(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The scales of those tensors that are 8-bit weights."""
    quantization = quantization_of(config)
    if quantization is None:
        return {}
    return {
        f"{name}{OF_SCALE}": (shape[0], 1)
        for name, shape in shapes.items()
        if name.endswith(".weight") and quantization.covers(name.removesuffix(".weight"))
    }


def _mlp_shapes(scope: str, hidden: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{scope}gate_proj.weight": (columns, hidden),
        f"{scope}up_proj.weight": (columns, hidden),
        f"{scope}down_proj.weight": (hidden, columns),
    }


def _sparse_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of the MLP of a layer with experts; none in a dense model."""
    experts, hidden = expert_count(config), config.hidden_size
    if not experts:
        return {}
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts, hidden)}
    for expert in range(experts):
        shapes |= _mlp_shapes(f"mlp.experts.{expert}.", hidden, config.moe_intermediate_size)
    shapes |= _mlp_shapes("mlp.shared_expert.", hidden, config.shared_expert_intermediate_size)
    return shapes | {"mlp.shared_expert_gate.weight": (1, hidden)}


def held_shapes(config: Any, shard: Shard) -> dict[str, tuple[int, ...]]:
    """The same for the parts that one rank holds."""
    return {name: shard.shape_of(name, shape, config) for name, shape in stock_shapes(config).items()}


def stock_layout(model: PreTrainedModel) -> dict[str, StackedRows]:
    """Every stock tensor name with the rows it has in ``model``; a tied lm_head is not a tensor of its own."""
    layout: dict[str, StackedRows] = {}
    ranks: Any = model.ranks
    shapes = held_shapes(model.config, ranks.shard)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if model.config.tie_word_embeddings and name == HEAD:
            continue
        *scope, module, kind = name.split(".")
        if module == EXPERTS:
            layout |= _experts_layout(name, parameter)
            continue
        start = 0
        for part in FUSED.get(module, (module,)):
            stock = ".".join([*scope, part, kind])
            rows = shapes[stock][0] if module in FUSED else parameter.shape[0]
            layout[stock] = StackedRows(name, start, (rows, *parameter.shape[1:]))
            start += rows
    return layout


def _experts_layout(name: str, parameter: torch.Tensor) -> dict[str, StackedRows]:
    """The stock tensors in a parameter (experts, K, N), which stack their rows along N."""
    scope, module = name.rsplit(".", 1)
    parts = FUSED.get(module, (module,))
    experts, inner, columns = parameter.shape
    rows = columns // len(parts)
    return {
        f"{scope}.{expert}.{part}.weight": StackedRows(name, place * rows, (rows, inner), expert)
        for expert in range(experts)
        for place, part in enumerate(parts)
    }


def check_room(config: Any, shard: Shard) -> None:
    """Refuse a model that the memory of this machine cannot hold, where the CPU is the device that models are made on.

    Raises:
        MemoryError: with both sizes.
    """
    if torch.get_default_device().type != "cpu":
        return
    one, item, needed, rest = copy.copy(config), torch.get_default_dtype().itemsize, 0, 0
    one.num_hidden_layers = one.decoder_sparse_step = 1
    for sparse, count in Counter(is_sparse(config, index) for index in range(config.num_hidden_layers)).items():
        one.mlp_only_layers = [] if sparse else [0]
        shapes = held_shapes(one, shard)
        sizes_of = {name: math.prod(held) * (1 if name + OF_SCALE in shapes else item) for name, held in shapes.items()}
        layer = sum(size for name, size in sizes_of.items() if name.startswith("model.layers."))
        needed, rest = needed + layer * count, sum(sizes_of.values()) - layer
    needed += rest
    there = psutil.virtual_memory().total
    if needed > there:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        raise MemoryError(
            f"the weights of this configuration take {human_bytes(needed)}, this machine has {human_bytes(there)}: "
            f"correct {', '.join(f'{name}={getattr(config, name)}' for name in sizes)}, or read a checkpoint onto an "
            "accelerator with from_pretrained"
        )


def skeleton(factory: Callable[[], ModelT], source: Source, head: Sequence[str] = CAUSAL_LM) -> ModelT:
    """The model without weights, on the meta device, where those of ``source`` fit it.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors; found before anything is built.
    """
    check_source(source, head)
    with torch.device("meta"):
        return factory()


def build(
    factory: Callable[[], ModelT],
    source: Source,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    head: Sequence[str] = CAUSAL_LM,
) -> ModelT:
    """Make the model and read its weights, one tensor at a time.

    8-bit weights are dequantised while they are read where the model does not compute with them.

    Args:
        factory: makes the model; called on the meta device, so that nothing is allocated twice.
        dtype: of the weights in memory; None for what they are stored in.
        head: the parameters of the model beyond the network.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors; found before anything is read. Or a scale of 8-bit
            weights that ``dtype`` does not hold.
        UnsupportedError: a dtype that the model does not compute in.
    """
    dtype = dtype or source.stored_dtype()
    check_dtype(dtype, "pass dtype='float32'")
    model = skeleton(factory, source, head)
    layout = stock_layout(model)
    if any(name.endswith(OF_SCALE) and name not in layout for name in source.shapes()):
        source = Dequantized(source, dtype)
        vars(model.config).pop(FIELD, None)  # a copy of the source's: this model has ordinary weights
    _materialise(model, dtype, device)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in source.tensors(cut_for(model)):
        if name in layout:
            place = layout[name]
            stored = scale_in(dtype, tensor, name) if name.endswith(OF_SCALE) else tensor
            place.of(parameters[place.parameter].data).copy_(stored)
    return model.eval()


def cut_for(model: PreTrainedModel) -> Cutting:
    """Which part of every stock tensor ``model`` holds."""
    ranks: Any = model.ranks
    return lambda name: ranks.shard.slice_of(name, model.config)


def _materialise(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            make = empty_weight if parameter.dim() == 3 else torch.empty  # as in stock_layout: all experts
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            empty = make(parameter.shape, dtype=kind, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    if model.config.tie_word_embeddings and hasattr(model, "lm_head"):
        model.lm_head.weight = model.model.embed_tokens.weight


def check_source(source: Source, head: Sequence[str] = CAUSAL_LM) -> None:
    """Compare the names and shapes of the tensors in ``source`` with what its configuration and ``head`` imply.

    Raises:
        CheckpointError: they do not fit.
        UnsupportedError: no rotary frequencies follow from the configuration.
    """
    config, found = source.config, source.shapes()
    check_fields(config)
    where = getattr(source, "where", type(source).__name__)
    way_out = "fetch it again, or correct config.json"
    if config.num_hidden_layers > len(found):  # no list of the names that are missing: it may be of any length
        layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
        raise CheckpointError(
            f"{where} does not fit its configuration: num_hidden_layers={config.num_hidden_layers}, and there are "
            f"tensors of {len(layers)} layers; {way_out}"
        )
    expected = stock_shapes(config, head)
    missing = sorted(set(expected) - set(found))
    extra = sorted(name for name in set(found) - set(expected) if not _ignorable(name, expected, head))
    wrong = [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(items)} {kind}, first {items[0]}"
        for kind, items in (("tensors missing", missing), ("tensors unexpected", extra), ("tensors mis-shaped", wrong))
        if items
    ]
    if missing == [HEAD]:
        way_out = (
            "a base model has none: save the whole model; or, where the embedding is the head, set tie_word_embeddings "
            "to true in config.json"
        )
    elif (fused := next((name for name in extra if FUSED.keys() & name.split(".")), None)) is not None:
        way_out = f"{fused} is fused: take the weights of such a model with stock_state_dict()"
    if problems:
        raise CheckpointError(f"{where} does not fit its configuration: {'; '.join(problems)}; {way_out}")
    check_rope(config)


def _ignorable(name: str, expected: Collection[str], head: Sequence[str]) -> bool:
    # Old checkpoints carry the rotary frequencies, and some a copy of a tied head; a model without a head is read from
    # the checkpoint of one with any.
    other_head = CAUSAL_LM if head else (*CAUSAL_LM, "score.weight", "score.bias")
    return name.endswith("rotary_emb.inv_freq") or (name in other_head and name not in expected)


def stock_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights under stock names, as views."""
    stock: Any = model
    prefix = "" if stock.head else NETWORK  # the stock Qwen2Model is the network itself
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name.removeprefix(prefix): rows.of(parameters[rows.parameter].data)
        for name, rows in stock_layout(model).items()
    }


# ---- saving ---------------------------------------------------------------------------------------------------------
def save(model: PreTrainedModel, folder: Path, *, max_shard_size: int | str) -> None:
    """Write config, generation config and shards, and put them in place of what is there; see ``save_pretrained``."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state_dict, quantization = stock_state_dict(model), quantization_of(model.config)
    sizes = stored_sizes(state_dict, packed=quantization is not None and quantization.packed)
    plan = split_torch_state_dict_into_shards(
        sizes, max_shard_size=max_shard_size, filename_pattern="model{suffix}.safetensors"
    )

    def write(target: Path) -> None:
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: stored_tensor(name, state_dict) for name in names}
            save_file(tensors, target / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for field in (merged.RECORD, WEIGHTS_FIELD):  # of what was loaded; here are the stock layout and files
            vars(model.config).pop(field, None)
        model.config.architectures = [type(model).__name__]
        readable_by_both(model.config).save_pretrained(target)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(target)

    try:
        replace_checkpoint(folder, write)
    except NotRestoredError as error:
        raise CheckpointError(f"cannot save the checkpoint to {folder}: {error}") from error
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        way_out = "Free space or choose" if full else "Allow writing there, or choose"
        raise CheckpointError(
            f"cannot save the checkpoint to {folder}: {error}; what was there is unchanged. {way_out} another folder"
        ) from error
