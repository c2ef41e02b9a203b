"""The network below the head: embedding, decoder layers, final norm.

Shapes: B batch, S new tokens, N heads, H hidden.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen2Config
from transformers.cache_utils import Cache

from qwen2_npu.checkpoint.quantization import Quantization, quantization_of
from qwen2_npu.compat import is_sparse, sliding_windows
from qwen2_npu.models.attention import Attention, AttentionInputs, AttentionPhase
from qwen2_npu.models.experts import SparseMLP
from qwen2_npu.models.layers import (
    FLOAT,
    MLP,
    Embedding,
    Products,
    RMSNorm,
    RotaryTable,
    for_all_heads,
    take_positions,
)
from qwen2_npu.models.quantized import QuantizedLinear
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.collectives import Ranks

LayerCache = tuple[torch.Tensor, torch.Tensor] | Cache | None
"""What the attention of one layer reads and writes."""

Record = tuple[list[torch.Tensor], list[torch.Tensor | None]]
"""Hidden states and attention weights of every layer."""


class DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP, with the residual sum threaded through the norms."""

    def __init__(
        self,
        config: Qwen2Config,
        optimizations: Optimizations,
        layer: int,
        window: int | None,
        rotary: RotaryTable,
        ranks: Ranks,
        products: Products = FLOAT,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, optimizations, layer, window, rotary, ranks, products)
        if is_sparse(config, layer):
            self.mlp: nn.Module = SparseMLP(config, optimizations, ranks)
        else:
            self.mlp = MLP(config, optimizations, ranks, products=products)
        self.input_layernorm = products.norm("self_attn.q_proj", config, optimizations)
        self.post_attention_layernorm = products.norm("mlp.gate_proj", config, optimizations)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        phase: AttentionPhase,
        inputs: AttentionInputs,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        cache: LayerCache,
        attentions: list[torch.Tensor | None] | None = None,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S or kept, H): the MLP's result still to be added, and the residual to add it to.

        Args:
            attentions: a list to which the attention weights, if any, are appended.
            kept: (B, kept) positions to compute; of the others only k and v. None for all.
        """
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states, weights = self.self_attn(hidden_states, phase, inputs, cos_sin, cache, kept)
        if attentions is not None:
            attentions.append(weights)
        del weights  # (B, N, S, S): not to be held while the MLP runs
        if kept is not None:
            residual, phase = take_positions(residual, kept), "decode"  # few rows from here on
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states, phase), residual


def _products(optimizations: Optimizations, quantization: Quantization | None, layer: int) -> Products:
    """What makes the linear layers of that decoder layer."""
    if quantization is None:
        return FLOAT
    return Products(optimizations.scheme, lambda name: quantization.covers(f"model.layers.{layer}.{name}"))


class Network(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: Qwen2Config, optimizations: Optimizations, ranks: Ranks) -> None:
        super().__init__()
        self.shared_cos_sin = optimizations.flash_attention
        self.heads, self.kv_heads = (ranks.shard.count(unit, config) for unit in ("query heads", "kv heads"))
        self.one_rotary, self.rows_alone = optimizations.one_rotary, optimizations.kv_scatter
        quantization = quantization_of(config)
        self.embed_tokens = Embedding(config, ranks)
        self.rotary = RotaryTable(config)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config, optimizations, layer, window, self.rotary, ranks, _products(optimizations, quantization, layer)
            )
            for layer, window in enumerate(sliding_windows(config))
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, optimizations.add_rms_norm)
        # In a tuple: not submodules a second time.
        self.quantized = tuple(module for module in self.layers.modules() if isinstance(module, QuantizedLinear))

    def prepare_quantized(self) -> None:
        """Have the copies that products of 8-bit weights take. Outside of any graph."""
        if any(module.wide_scale is None for module in self.quantized):
            for module in self.quantized:
                module.prepare()

    def forward(
        self,
        tokens: torch.Tensor,
        phase: AttentionPhase,
        inputs: AttentionInputs,
        caches: list[LayerCache],
        record: Record | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The hidden states (B, S or kept, H) after the final norm.

        Args:
            tokens: (B, S) token ids, or (B, S, H) embeddings.
            caches: per layer what its attention reads and writes.
            record: two lists to which the hidden states and attention weights of every layer are appended.
            kept: (B, kept) positions that the last layer computes; None for all.
        """
        hidden_states = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        cos_sin = self.rotary(inputs.position_ids, head_axis=2) if self.shared_cos_sin else None
        if cos_sin is not None and self.one_rotary and phase == "decode":
            cos_sin = for_all_heads(cos_sin[0], cos_sin[1], self.heads + self.kv_heads, self.kv_heads)
        as_rows = self.rows_alone and phase == "decode" and record is None
        if as_rows:  # of two dimensions, the graph engine makes plain products
            hidden_states = hidden_states.squeeze(1)
        residual: torch.Tensor | None = None
        attentions = None if record is None else record[1]
        *_, last = self.layers
        for layer, cache in zip(self.layers, caches, strict=True):
            if record is not None:
                record[0].append(hidden_states if residual is None else residual + hidden_states)
            hidden_states, residual = layer(
                hidden_states, residual, phase, inputs, cos_sin, cache, attentions, kept if layer is last else None
            )
        hidden_states, _ = self.norm(hidden_states, residual)
        if record is not None:
            record[0].append(hidden_states)
        return hidden_states.unsqueeze(1) if as_rows else hidden_states
