"""npu_fused_infer_attention_score: version 2, and the forms with ``out=`` and a workspace that graph capture uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu import ops
from qwen2_npu.emulator.eager.operators.fusion_attention_out import into, workspace

Tensor = torch.Tensor

RENAMED = {
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "return_softmax_lse": "softmax_lse_flag",
}
"""Version 2's name of an argument -> version 1's."""


def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return ops.kernels["npu_fused_infer_attention_score"](query, key, value, **arguments)


def attention_v2(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Version 1 under other names. What it adds (rope apart, quantisation, sinks) is refused by version 1's check."""
    return attention(query, key, value, **{RENAMED.get(name, name): given for name, given in arguments.items()})


def outputs(query: Tensor, value: Tensor, *, input_layout: str = "BSH", **options: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors to hand over as ``out``."""
    out = query.transpose(1, 2) if input_layout == "BNSD_BSND" else query
    lse = query.new_empty(0, dtype=torch.float32)
    if options.get("softmax_lse_flag") or options.get("return_softmax_lse"):
        heads = options.get("num_heads") or options["num_query_heads"]
        rows = query.shape[2] if input_layout.startswith("BNSD") else query.shape[1]
        lse = lse.new_empty(query.shape[0], heads, rows, 1)
    return out.new_empty(out.shape), lse


TABLE: dict[str, Callable[..., Any]] = {
    "npu_fused_infer_attention_score.out": into(attention),
    "npu_fused_infer_attention_score_v2": attention_v2,
    "npu_fused_infer_attention_score_v2.out": into(attention_v2),
    "_npu_fused_infer_attention_score_get_max_workspace": workspace,
    "_npu_fused_infer_attention_score_v2_get_max_workspace": workspace,
    "_npu_fused_infer_attention_score_infer_output": outputs,
    "_npu_fused_infer_attention_score_v2_infer_output": outputs,
}
