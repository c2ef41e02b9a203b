"""The stock transformers model on several cards, cut by DeepSpeed's AutoTP: the ``original`` rows of the guide's 72B.

This project's own model is cut by :mod:`.sharding`. AutoTP does not serve it: it takes the fused q, k and v for three
equal parts (docs/parallel-accuracy.md).
"""

from __future__ import annotations

import os
from typing import Any

from qwen2_npu.compat import kv_head_count
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.collectives import Ranks


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
