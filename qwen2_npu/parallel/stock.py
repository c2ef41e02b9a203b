"""The stock transformers model on several cards, cut by DeepSpeed's AutoTP: the ``original`` rows of the guide's 72B.

This project's own model is cut by :mod:`.sharding`. AutoTP does not serve it: it takes the fused q, k and v for three
equal parts (docs/parallel-accuracy.md).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from qwen2_npu.compat import kv_head_count
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.agreement import of_all_ranks
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Slice

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stock_sharded(model: Any, ranks: Ranks) -> Any:
    """The part of the stock ``model`` that this rank computes. All ranks must ask; the process group is theirs.

    Args:
        model: transformers' Qwen2ForCausalLM with all weights, which is changed in place, on the device of this rank.
        ranks: those of the process group, see :func:`.collectives.current`.

    Returns:
        The model itself: ``forward`` and ``generate`` take and return what they did.

    Raises:
        UnsupportedError: DeepSpeed is not installed, ``ranks`` are not those of the process group, or AutoTP cannot cut
            this model for as many.
    """
    if ranks.size == 1:
        return model
    ranks.shard.check(model.config)
    if kv_head_count(model.config) % ranks.size:
        raise UnsupportedError(
            f"tp_size={ranks.size}: AutoTP gives every rank whole kv heads of its own, and the stock model has "
            f"{kv_head_count(model.config)}; use fewer ranks, or this project's model, which shares kv heads"
        )
    if ranks.group is None:
        raise UnsupportedError(
            f"tp_size={ranks.size}: AutoTP cuts the model for the ranks of the process group; start as many processes "
            "(docs/parallel.md)"
        )
    # DeepSpeed chooses its device when it is imported: an NPU wherever torch_npu is installed. On a CPU it sums in
    # memory that it has only where its launcher's LOCAL_SIZE is set; without, it crashes.
    os.environ.setdefault("DS_ACCELERATOR", model.device.type)
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(ranks.size)))
    try:
        import deepspeed
    except ImportError as error:
        raise UnsupportedError(
            "the stock model is cut for several cards by DeepSpeed, which is not installed: "
            'pip install -e ".[deepspeed]"'
        ) from error
    device = model.device
    engine = deepspeed.init_inference(
        model, tensor_parallel={"tp_size": ranks.size}, dtype=model.dtype, replace_with_kernel_inject=False
    )
    return engine.module.to(device)


def hollow(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """``model`` on ``device`` with parameters that take no memory: one number each, seen in their shape.

    AutoTP cuts them like others; :func:`filled` then gives the parts their values. So no rank holds a whole model.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            number = torch.zeros((), dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(number.expand(parameter.shape), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    return model


def filled(model: Any, source: Any, ranks: Ranks) -> Any:
    """A model that :func:`stock_sharded` made of a :func:`hollow` one, with weights. All ranks must ask.

    Args:
        source: where they come from (``qwen2_npu.checkpoint.sources.Source``). What the model has no parameter for,
            such as rotary frequencies of old checkpoints, is left out.
    """
    shapes, parameters = source.shapes(), dict(model.named_parameters())
    # AutoTP cuts an lm_head that is tied to the embedding, and leaves the embedding whole.
    wholes = {**shapes, HEAD: shapes.get(HEAD, shapes[EMBEDDING])}
    assert parameters.keys() <= wholes.keys(), "AutoTP renamed parameters"
    cut = {name: _axis(tuple(parameter.shape), wholes[name]) for name, parameter in parameters.items()}
    sizes = of_all_ranks({name: parameters[name].shape[axis] for name, axis in cut.items() if axis is not None})

    def part(name: str) -> Slice | None:
        axis = cut.get(name)
        if axis is None:
            return None
        start = sum(each[name] for each in sizes[: ranks.shard.rank])
        return Slice(axis, start, start + sizes[ranks.shard.rank][name])

    def fill(name: str, tensor: torch.Tensor) -> None:
        own = parameters[name]
        own.data = torch.empty(own.shape, dtype=own.dtype, device=own.device).copy_(tensor)

    for name, tensor in source.tensors(part):
        if name in parameters:
            fill(name, tensor)
    if HEAD in parameters and HEAD not in shapes:
        embedding, found = parameters[EMBEDDING].data, part(HEAD)
        fill(HEAD, embedding if found is None else embedding.narrow(found.axis, found.start, found.stop - found.start))
    return model


def _axis(part: tuple[int, ...], whole: tuple[int, ...]) -> int | None:
    """The axis along which ``part`` was cut from ``whole``; None where it was not."""
    return next((axis for axis, (own, all_of_it) in enumerate(zip(part, whole, strict=True)) if own != all_of_it), None)
