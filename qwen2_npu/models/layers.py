"""The parts of a decoder layer other than attention, and the rotary table.

Shapes: B batch, S tokens, H hidden, I columns of the MLP on this rank, D head_dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config

from qwen2_npu.compat import head_dim, rope_frequencies
from qwen2_npu.models.quantized import (
    Activations,
    QuantizedLinear,
    QuantizedRows,
    RowParallelQuantizedLinear,
    Scheme,
    quantise,
    swiglu_quantised,
)
from qwen2_npu.ops.linear import linear
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.collectives import Ranks

ActivationsT = TypeVar("ActivationsT", torch.Tensor, QuantizedRows, Activations)


def take_positions(values: ActivationsT, index: torch.Tensor) -> ActivationsT:
    """(B, S, …) and positions (B, K) -> (B, K, …)."""
    if isinstance(values, QuantizedRows):
        return QuantizedRows(*(take_positions(part, index) for part in values))
    return values.gather(
        1, index.reshape(index.shape + (1,) * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
    )


class Linear(nn.Linear):
    """nn.Linear by :func:`qwen2_npu.ops.linear.linear`: the same product, faster for a few rows on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)

    def parts(self, inputs: Sequence[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        """What each of ``inputs`` gives with so many outputs of its own, in their order."""
        weights, biases = self.weight.split(sizes), self.bias.split(sizes)  # views, not copies
        return [linear(*part) for part in zip(inputs, weights, biases, strict=True)]


class Embedding(nn.Embedding):
    """The rows of the embedding table that this rank holds, looked up and added up over the ranks."""

    def __init__(self, config: Qwen2Config, ranks: Ranks) -> None:
        tokens = ranks.shard.part("vocabulary", config)
        self.cut = len(tokens) < config.vocab_size
        padding = None if self.cut else getattr(config, "pad_token_id", None)
        super().__init__(len(tokens), config.hidden_size, padding)
        self.first, self.ranks = tokens.start, ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, S) token ids -> (B, S, H)."""
        if not self.cut:
            return super().forward(input)
        row = input - self.first
        elsewhere = (row < 0) | (row >= self.num_embeddings)
        found = super().forward(row.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.ranks.all_reduce(found)


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


class RowParallelLinear(Linear):
    """A product whose input is cut over the ranks, and the sum of what they compute: no bias, which would be summed.

    Attributes:
        hcom: with the mm_all_reduce step, the communicator in which product and sum are one operator; None otherwise.
    """

    def __init__(self, in_features: int, out_features: int, ranks: Ranks) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.ranks = ranks
        self.hcom: str | None = None

    def forward(self, input: torch.Tensor, phase: str = "decode") -> torch.Tensor:
        """(..., K of this rank) -> (..., N), summed over the ranks."""
        if self.hcom is not None and phase != "decode":
            return torch.ops.npu.npu_mm_all_reduce_base(input, self.weight.t(), self.hcom)
        return self.ranks.all_reduce(super().forward(input))


class QuantizingRMSNorm(RMSNorm):
    """The same, its result quantised per token: for products of 8-bit activations.

    Args:
        separate: normalise and quantise by two operators where one does both.
    """

    def __init__(self, hidden_size: int, eps: float, fused: bool, separate: bool) -> None:
        super().__init__(hidden_size, eps, fused)
        self.separate = separate

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[QuantizedRows, torch.Tensor]:
        """As of :class:`RMSNorm`."""
        if self.fused and residual is not None and not self.separate:
            values, _, total, scale, _ = torch.ops.npu.npu_add_rms_norm_dynamic_quant(
                residual, hidden_states, self.weight, epsilon=self.eps, output_mask=[True, False]
            )
            return QuantizedRows(values, scale), total
        normed, total = super().forward(hidden_states, residual)
        return quantise(normed), total


@dataclass(frozen=True)
class Products:
    """Makes the linear layers of a decoder layer, and its norms: of 8-bit weights where the checkpoint has them.

    Attributes:
        scheme: of 8-bit weights; None where all weights are floating-point numbers.
        covers: whether the stock module of that name, within the layer, is quantised.
    """

    scheme: Scheme | None = None
    covers: Callable[[str], bool] = lambda name: False

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> Any:
        """Of the stock module ``name``, or the fused one that begins with its rows."""
        if self.scheme is not None and self.covers(name):
            return QuantizedLinear(inputs, outputs, bias, self.scheme, name)
        return Linear(inputs, outputs, bias=bias)

    def row_parallel(self, name: str, inputs: int, outputs: int, ranks: Ranks) -> Any:
        """A product whose input is cut over the ranks."""
        if self.scheme is not None and self.covers(name):
            return RowParallelQuantizedLinear(inputs, outputs, ranks, self.scheme, name)
        return RowParallelLinear(inputs, outputs, ranks)

    def norm(self, before: str, config: Qwen2Config, optimizations: Optimizations) -> RMSNorm:
        """The norm whose result goes to the stock module ``before``, and to those that share its input."""
        size, eps, fused = config.hidden_size, config.rms_norm_eps, optimizations.add_rms_norm
        if self.scheme == "w8a8" and self.covers(before):
            return QuantizingRMSNorm(size, eps, fused, optimizations.separate_norm_quant)
        return RMSNorm(size, eps, fused)


FLOAT = Products()


class MLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``; gate and up are one product with ``fused_gate_up``, stacked [gate; up].

    Args:
        intermediate: columns that this rank holds; default: those that the configuration gives it.
        products: makes the linear layers.
    """

    def __init__(
        self,
        config: Qwen2Config,
        optimizations: Optimizations,
        ranks: Ranks,
        intermediate: int | None = None,
        products: Products = FLOAT,
    ) -> None:
        super().__init__()
        self.swiglu = optimizations.swiglu
        self.fused = optimizations.fused_gate_up
        hidden = config.hidden_size
        intermediate = ranks.shard.count("columns", config) if intermediate is None else intermediate
        if self.fused:
            self.gate_up_proj = products.linear("mlp.gate_proj", hidden, 2 * intermediate, bias=False)
        else:
            self.gate_proj = products.linear("mlp.gate_proj", hidden, intermediate, bias=False)
            self.up_proj = products.linear("mlp.up_proj", hidden, intermediate, bias=False)
        self.down_proj = products.row_parallel("mlp.down_proj", intermediate, hidden, ranks)
        self.quantised = optimizations.w8a8 and all(map(products.covers, ("mlp.gate_proj", "mlp.down_proj")))

    def forward(self, x: Activations, phase: str = "decode") -> torch.Tensor:
        """(B, S, H) -> (B, S, H)."""
        if self.swiglu and self.quantised:
            return self.down_proj(swiglu_quantised(self.gate_up_proj, x), phase)
        if self.swiglu:
            return self.down_proj(torch.ops.npu.npu_swiglu(self.gate_up_proj(x), dim=-1), phase)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up, phase)


def for_all_heads(cos: torch.Tensor, sin: torch.Tensor, turned: int, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, 1, D) each -> (B, S, turned + kept, D): the angles for the first heads, 1 and 0 for the others, which then
    stay as they are."""
    # Two products and a sum, exact: a graph has no cheaper way to fill the rest.
    turns = torch.cat((cos.new_ones(turned, 1), cos.new_zeros(kept, 1)))
    return cos * turns + (1 - turns), sin * turns


TABLE_ROWS = 131072
"""Positions that a rotary table has at least, unless the model has fewer: as many as a checkpoint usually has."""

_GROWING = threading.Lock()


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once in float32 and rounded to the model's dtype, as the stock model
    does.

    A configuration may promise any number of positions. Those beyond :data:`TABLE_ROWS` are computed when they are
    needed, in powers of two: few tables in the life of a model, since graphs are compiled for the table there is.

    Attributes:
        positions: those of the model.
        cos, sin: (rows, D), both halves alike; None until :meth:`prepare`.
    """

    cos: torch.Tensor | None
    sin: torch.Tensor | None

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.positions: int = config.max_position_embeddings
        self.head_dim = head_dim(config)
        self.frequencies = rope_frequencies(config)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryTable:
        """Where the model changes its dtype or device the table goes: rounded once, it cannot be widened again."""
        super()._apply(fn, recurse)
        self.cos = self.sin = None
        return self

    def prepare(self, dtype: torch.dtype, device: torch.device, positions: int = 0, padded: int = 0) -> None:
        """Build the table for ``dtype``, ``device`` and that many positions unless it is there. Outside of any graph.

        Args:
            positions: those needed, as far as the model has them; more may be there.
            padded: those needed in rows whose padding takes positions, which may be more than the model has.
        """
        positions = min(positions, self.positions) if padded <= self.positions else padded
        if self._serves(dtype, device, positions):
            return
        with _GROWING, torch.inference_mode(False):  # it outlives the call
            if self._serves(dtype, device, positions):  # another thread has built it
                return
            rows = 1 << (positions - 1).bit_length()
            if positions <= self.positions:
                rows = min(self.positions, max(TABLE_ROWS, rows))
            inv_freq, scaling = self.frequencies
            angles = torch.outer(torch.arange(rows, dtype=torch.float32, device="cpu"), inv_freq)
            self.sin, self.cos = (
                torch.cat((half, half), dim=-1)
                for half in (
                    (function(angles) * scaling).to(device=device, dtype=dtype) for function in (torch.sin, torch.cos)
                )
            )

    def _serves(self, dtype: torch.dtype, device: torch.device, positions: int) -> bool:
        table = self.cos
        return table is not None and (table.dtype, table.device) == (dtype, device) and table.shape[0] >= positions

    def forward(self, position_ids: torch.Tensor, head_axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at ``position_ids`` (B, S), with an axis for the heads at ``head_axis``."""
        assert self.cos is not None, "RotaryTable.prepare() comes first"
        assert self.sin is not None
        cos, sin = F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)
        return cos.unsqueeze(head_axis), sin.unsqueeze(head_axis)
