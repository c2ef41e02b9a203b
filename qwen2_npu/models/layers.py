"""The parts of a decoder layer other than attention, and the rotary table.

Shapes: B batch, S tokens, H hidden, I intermediate, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config

from qwen2_npu.compat import head_dim, rope_frequencies
from qwen2_npu.ops.linear import linear
from qwen2_npu.optimizations import Optimizations


class Linear(nn.Linear):
    """nn.Linear by :func:`qwen2_npu.ops.linear.linear`: the same product, faster for a few rows on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight``: by small operators as the stock model, or by npu_(add_)rms_norm.

    The two round differently: the stock order rounds ``x·rstd`` to the dtype before the weight, npu_rms_norm once at
        the end.
    """

    def __init__(self, hidden_size: int, eps: float, fused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.fused = fused

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, then normalise.

        Args:
            hidden_states: (B, S, H), what the previous block computed.
            residual: (B, S, H), what it is added to; None at the first norm, where nothing is pending.

        Returns:
            The normalised sum, and the sum itself (the new residual).
        """
        if self.fused:
            if residual is None:
                normed, _ = torch.ops.npu.npu_rms_norm(hidden_states, self.weight, self.eps)
                return normed, hidden_states
            normed, _, total = torch.ops.npu.npu_add_rms_norm(residual, hidden_states, self.weight, self.eps)
            return normed, total
        total = hidden_states if residual is None else residual + hidden_states
        wide = total.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(total.dtype), total


class MLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``; gate and up are one product with ``fused_gate_up``, stacked [gate; up]."""

    def __init__(self, config: Qwen2Config, optimizations: Optimizations) -> None:
        super().__init__()
        self.swiglu = optimizations.swiglu
        self.fused = optimizations.fused_gate_up
        hidden, intermediate = config.hidden_size, config.intermediate_size
        if self.fused:
            self.gate_up_proj = Linear(hidden, 2 * intermediate, bias=False)
        else:
            self.gate_proj = Linear(hidden, intermediate, bias=False)
            self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H) -> (B, S, H)."""
        if self.swiglu:
            return self.down_proj(torch.ops.npu.npu_swiglu(self.gate_up_proj(x), dim=-1))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once in float32 and rounded to the model's dtype, as the stock model
    does.

    Attributes:
        cos, sin: (max_position_embeddings, D), both halves alike; None until :meth:`prepare`.
    """

    cos: torch.Tensor | None
    sin: torch.Tensor | None

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.positions: int = config.max_position_embeddings
        self.head_dim = head_dim(config)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryTable:
        """Where the model changes its dtype or device the table goes: rounded once, it cannot be widened again."""
        super()._apply(fn, recurse)
        self.cos = self.sin = None
        return self

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Build the table for ``dtype`` and ``device`` unless it is there. Outside of any graph."""
        if self.cos is not None and self.cos.dtype == dtype and self.cos.device == device:
            return
        with torch.inference_mode(False):  # it outlives the call
            inv_freq, scaling = rope_frequencies(self.config)
            angles = torch.outer(torch.arange(self.positions, dtype=torch.float32, device="cpu"), inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            self.cos = (angles.cos() * scaling).to(device=device, dtype=dtype)
            self.sin = (angles.sin() * scaling).to(device=device, dtype=dtype)

    def forward(self, position_ids: torch.Tensor, head_axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at ``position_ids`` (B, S), with an axis for the heads at ``head_axis``."""
        assert self.cos is not None, "RotaryTable.prepare() comes first"
        assert self.sin is not None
        cos, sin = F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)
        return cos.unsqueeze(head_axis), sin.unsqueeze(head_axis)
