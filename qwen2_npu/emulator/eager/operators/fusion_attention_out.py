"""The forms of npu_fusion_attention with ``out=`` and a workspace, which graph capture uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen2_npu.emulator.eager.operators.dropout import drawing
from qwen2_npu.emulator.eager.operators.fusion_attention import (
    STATISTICS,
    attention_grad,
    attention_v3,
    kv_heads,
    to_bnsd,
)

Tensor = torch.Tensor


def into(function: Callable[..., Sequence[Tensor | None]]) -> Callable[..., tuple[Tensor, ...]]:
    """The ``out=`` form of ``function``. Unused results are empty and not written; the workspace has no use here."""

    def write(*args: Any, workspace: Tensor | None = None, out: Sequence[Tensor], **kwargs: Any) -> tuple[Tensor, ...]:
        found = function(*args, **kwargs)
        return tuple(
            target.copy_(value) if value is not None and value.numel() else target
            for target, value in zip(out, found, strict=True)
        )

    return write


def workspace(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """An empty tensor: no scratch memory is needed here, where CANN says how much it needs."""
    return torch.empty(0, dtype=torch.uint8)


def outputs(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str) -> tuple[Tensor, ...]:
    """Uninitialised tensors to hand over as ``out``: the result, and the rows' maxima and sums."""
    if input_layout == "TND":
        shape = query.shape[:2]
        out = query.new_empty(*shape, value.shape[-1])
    else:
        shape = to_bnsd(query, input_layout, head_num).shape[:3]
        width = to_bnsd(value, input_layout, kv_heads(query, key, input_layout, head_num)).shape[-1]
        last = width * head_num if input_layout in ("BSH", "SBH") else width
        out = query.new_empty(*query.shape[:-1], last)
    statistics = (query.new_empty(*shape, STATISTICS, dtype=torch.float32) for _ in range(2))
    return out, *statistics


def grad_outputs(
    query: Tensor, key: Tensor, value: Tensor, pse: Tensor | None = None, sink: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Uninitialised tensors for the gradients by query, key, value, pse, sink."""
    optional = (query.new_empty(0) if given is None else torch.empty_like(given) for given in (pse, sink))
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *optional


TABLE: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention_v3.out": drawing(into(attention_v3)),
    "npu_fusion_attention_grad_v3.out": into(attention_grad("npu_fusion_attention_grad_v3")),
    "_npu_fusion_attention_v3_get_max_workspace": workspace,
    "_npu_fusion_attention_grad_v3_get_max_workspace": workspace,
    "_npu_fusion_attention_v3_infer_output": outputs,
    "_npu_fusion_attention_grad_v3_infer_output": grad_outputs,
}
