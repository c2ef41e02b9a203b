"""Qwen2's attention in the two forms of the ladder: small operators on BNSD, fused operators on BSND.

Shapes: B batch, S new tokens, C slots of the KV cache, N query heads and K kv heads of this rank, D head_dim, H
hidden.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import Qwen2Config
from transformers.cache_utils import Cache

from qwen2_npu.compat import head_dim
from qwen2_npu.models.layers import FLOAT, Products, RotaryTable, take_positions
from qwen2_npu.models.quantized import Activations
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.collectives import Ranks

AttentionPhase = Literal["prefill", "decode", "extend"]
"""prefill: nothing in the cache yet; decode: one token per row; extend: several tokens after what the cache holds."""

UNLIMITED = 2147483647  # the operators' own "no limit" for pre_tokens and next_tokens

SPARSE_NONE = 0  # the mask as it is, for one token; of a prompt there is none: it sees itself
SPARSE_FULL_MASK = 1  # every entry of the mask counts, pre_tokens and next_tokens are ignored
SPARSE_CAUSAL = 2  # top-left causal, from the 2048×2048 compressed mask
SPARSE_BAND = 4  # pre_tokens and next_tokens around the diagonal, from the compressed mask

FUSED_ROPE_HEAD_DIM = 128  # npu_apply_rotary_pos_emb's only head_dim on A2; others take npu_rotary_mul


class AttentionInputs(NamedTuple):
    """What the layers of one forward pass share. Tensors only where a graph needs them, so that it can be compiled.

    Attributes:
        position_ids: (B, S) rotary positions.
        write_index: (B,) first slot each row writes to, None without a fixed cache.
        mask: True = drop, in the shape the phase needs, None where nothing is to be dropped.
        sliding_mask: the same for layers with a sliding window.
        actual_seq_lengths: live KV tokens per row on the host, None where the operators should look at masks alone.
        slots: (B,) with kv_scatter, in a decode step: ``write_index`` counted over all rows of the cache.
    """

    position_ids: torch.Tensor
    write_index: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sliding_mask: torch.Tensor | None = None
    actual_seq_lengths: list[int] | None = None
    slots: torch.Tensor | None = None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Args:
        window: the layer's sliding window in tokens, None for full attention.
        ranks: those whose heads are added up after o_proj.
        products: makes the linear layers.
    """

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
        self.optimizations = optimizations
        self.layer = layer
        self.window = window
        self._rotary = (rotary,)  # in a tuple: one table for the model, not a submodule of every layer
        self.heads = ranks.shard.count("query heads", config)
        self.kv_heads = ranks.shard.count("kv heads", config)
        self.head_dim = head_dim(config)
        self.scale = self.head_dim**-0.5
        self.widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        if optimizations.fused_qkv:
            self.qkv_proj = products.linear("self_attn.q_proj", config.hidden_size, sum(self.widths), bias=True)
        else:
            self.q_proj = products.linear("self_attn.q_proj", config.hidden_size, self.widths[0], bias=True)
            self.k_proj = products.linear("self_attn.k_proj", config.hidden_size, self.widths[1], bias=True)
            self.v_proj = products.linear("self_attn.v_proj", config.hidden_size, self.widths[2], bias=True)
        self.o_proj = products.row_parallel("self_attn.o_proj", self.widths[0], config.hidden_size, ranks)

    def forward(
        self,
        hidden_states: Activations,
        phase: AttentionPhase,
        inputs: AttentionInputs,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        cache: tuple[torch.Tensor, torch.Tensor] | Cache | None,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, H) -> (B, S or kept, H), and the attention weights (B, N, S, tokens) of small operators. (B, H) of a
        decode step as rows -> (B, H).

        Args:
            cos_sin: shared by the layers from the flash_attention step on, (B, S, 1, D) each; (B, 1, N + 2·K, D) of a
                decode step with one_rotary; None before flash_attention.
            cache: this layer's k and v tensor, the growing stock cache, or None.
            kept: (B, kept) new positions whose attention is wanted, with fused operators; None for all.
        """
        if self.optimizations.one_rotary and phase == "decode":
            query, key, value = self._project_and_rotate(hidden_states, cos_sin)
        else:
            query, key, value = self._project(hidden_states, kept)
        batch, tokens = query.shape[:2]
        weights: torch.Tensor | None = None
        if self.optimizations.flash_attention:
            assert cos_sin is not None
            assert not isinstance(cache, Cache)
            context = self._fused(phase, inputs, cos_sin, cache, query, key, value, kept)
            phase = phase if kept is None else "decode"  # as few rows as a decode step has
        else:
            assert kept is None
            context, weights = self._small_operators(phase, inputs, cache, query, key, value)
        # A decode step goes through o_proj in two dimensions: in three, the graph engine pads the product (the guide's
        # out-of-memory fix).
        if tokens == 1:
            summed = self.o_proj(context.reshape(batch, self.widths[0]), phase)
            return summed if len(hidden_states.shape) == 2 else summed.unsqueeze(1), weights
        return self.o_proj(context.reshape(batch, tokens, self.widths[0]), phase), weights

    def _project(self, hidden_states: Activations, kept: torch.Tensor | None) -> list[torch.Tensor]:
        """q (B, S or kept, N, D), k and v (B, S, K, D)."""
        asking = hidden_states if kept is None else take_positions(hidden_states, kept)
        if self.optimizations.fused_qkv and kept is not None:
            query, rest = self.qkv_proj.parts([asking, hidden_states], [self.widths[0], 2 * self.widths[1]])
            states = [query, *rest.split(self.widths[1:], dim=-1)]
        elif self.optimizations.fused_qkv:
            states = list(self.qkv_proj(hidden_states).split(self.widths, dim=-1))
        else:
            states = [self.q_proj(asking), self.k_proj(hidden_states), self.v_proj(hidden_states)]
        heads = (self.heads, self.kv_heads, self.kv_heads)
        batch = hidden_states.shape[0]
        return [state.reshape(batch, -1, n, self.head_dim) for state, n in zip(states, heads, strict=True)]

    def _project_and_rotate(
        self, hidden_states: Activations, cos_sin: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, ...]:
        """As :meth:`_project`, q and k turned: one operator over all heads, in which those of v stay as they are."""
        assert cos_sin is not None
        states = self.qkv_proj(hidden_states).view(hidden_states.shape[0], 1, -1, self.head_dim)
        turned: torch.Tensor = torch.ops.npu.npu_rotary_mul(states, *cos_sin, rotary_mode="half")
        return turned.split([self.heads, self.kv_heads, self.kv_heads], dim=2)

    def _mask(self, inputs: AttentionInputs) -> torch.Tensor | None:
        return inputs.mask if self.window is None else inputs.sliding_mask

    def _mask_of(self, kept: torch.Tensor, phase: AttentionPhase, inputs: AttentionInputs, slots: int) -> torch.Tensor:
        """(B, 1, kept, slots): what the kept positions see of a prompt, or of the cache that it continues."""
        queries = kept
        if phase == "extend":
            assert inputs.write_index is not None
            queries = inputs.write_index[:, None] + kept
        distance = (queries[:, :, None] - torch.arange(slots, device=kept.device))[:, None]
        drop = distance < 0
        return drop if self.window is None else drop | (distance >= self.window)

    # ---- fused operators, BSND -----------------------------------------------------------------------------------
    def _fused(
        self,
        phase: AttentionPhase,
        inputs: AttentionInputs,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor] | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        # The operators take contiguous tensors, and the rotary one writes in place: parts of one qkv product are
        # copied. In a GE graph these copies vanish (qwen2_npu.graph.layout_copies).
        turned, rows = self.optimizations.one_rotary and phase == "decode", inputs.slots is not None
        if rows:  # the operator that writes them takes three dimensions; a view of a copy would keep it in the graph
            key, value = key.squeeze(1) if turned else key, value.squeeze(1)
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        if not turned:
            query, key = self._rotate_fused(query, key, cos_sin, kept)
        if cache is not None:
            if rows:
                key = key if turned else key.squeeze(1)
                torch.ops.npu.npu_scatter_pa_kv_cache(key, value, *cache, inputs.slots, cache_mode="Norm")
            else:
                for states, slots in zip((key, value), cache, strict=True):
                    torch.ops.npu.scatter_update_(slots, inputs.write_index, states, 1)
            if phase != "prefill":
                key, value = cache
        if kept is not None:
            mask = self._mask_of(kept, phase, inputs, key.shape[1])
            if kept.shape[1] == 1:
                return self._incremental_attention(query, key, value, mask, inputs.actual_seq_lengths)
            return self._prompt_attention("extend", query, key, value, mask, inputs.actual_seq_lengths)
        if phase == "decode":
            return self._incremental_attention(query, key, value, self._mask(inputs), inputs.actual_seq_lengths)
        return self._prompt_attention(phase, query, key, value, self._mask(inputs), inputs.actual_seq_lengths)

    def _rotate_fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        kept: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The operator for both takes as many positions of q as of k.
        if self.head_dim == FUSED_ROPE_HEAD_DIM and kept is None:
            return torch.ops.npu.npu_apply_rotary_pos_emb(query, key, *cos_sin, layout="BSND", rotary_mode="half")
        of_query = cos_sin if kept is None else [take_positions(part, kept) for part in cos_sin]
        return (
            torch.ops.npu.npu_rotary_mul(query, *of_query, rotary_mode="half"),
            torch.ops.npu.npu_rotary_mul(key, *cos_sin, rotary_mode="half"),
        )

    def _prompt_attention(
        self,
        phase: AttentionPhase,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        lengths: list[int] | None,
    ) -> torch.Tensor:
        pre_tokens, next_tokens, sparse_mode = UNLIMITED, UNLIMITED, SPARSE_FULL_MASK
        if phase == "prefill" and self.optimizations.last_token_logits:
            # Compute nothing above the diagonal, nor before the window.
            next_tokens = 0
            sparse_mode = SPARSE_CAUSAL
            if self.window is not None:
                pre_tokens, sparse_mode = self.window - 1, SPARSE_BAND
        if query.shape[1] == 1:
            mask, sparse_mode = None if phase == "prefill" else mask, SPARSE_NONE
        if self.optimizations.fused_infer_attention:
            return torch.ops.npu.npu_fused_infer_attention_score(
                query, key, value, num_heads=self.heads, num_key_value_heads=self.kv_heads, scale=self.scale,
                input_layout="BSND", atten_mask=mask, sparse_mode=sparse_mode, pre_tokens=pre_tokens,
                next_tokens=next_tokens, actual_seq_lengths_kv=lengths,
            )[0]  # fmt: skip
        return torch.ops.npu.npu_prompt_flash_attention(
            query, key, value, num_heads=self.heads, num_key_value_heads=self.kv_heads, scale_value=self.scale,
            input_layout="BSND", atten_mask=mask, sparse_mode=sparse_mode, pre_tokens=pre_tokens,
            next_tokens=next_tokens, actual_seq_lengths_kv=lengths,
        )  # fmt: skip

    def _incremental_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        lengths: list[int] | None,
    ) -> torch.Tensor:
        if self.optimizations.fused_infer_attention:
            return torch.ops.npu.npu_fused_infer_attention_score(
                query, key, value, num_heads=self.heads, num_key_value_heads=self.kv_heads, scale=self.scale,
                input_layout="BSND", atten_mask=mask, actual_seq_lengths_kv=lengths,
            )[0]  # fmt: skip
        return torch.ops.npu.npu_incre_flash_attention(
            query, key, value, num_heads=self.heads, num_key_value_heads=self.kv_heads, scale_value=self.scale,
            input_layout="BSND", atten_mask=mask, actual_seq_lengths=lengths,
        )  # fmt: skip

    # ---- small operators, BNSD, as the stock model -----------------------------------------------------------------
    def _small_operators(
        self,
        phase: AttentionPhase,
        inputs: AttentionInputs,
        cache: tuple[torch.Tensor, torch.Tensor] | Cache | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary[0](inputs.position_ids, head_axis=1)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query = query * cos + _rotate_half(query) * sin
        key = key * cos + _rotate_half(key) * sin
        if isinstance(cache, Cache):
            key, value = cache.update(key, value, self.layer)
        elif cache is not None:
            for states, slots in zip((key, value), cache, strict=True):
                torch.ops.npu.scatter_update_(slots, inputs.write_index, states.contiguous(), 2)
            if phase != "prefill":
                key, value = cache
        groups = self.heads // self.kv_heads
        key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        mask = self._mask(inputs)
        if mask is not None:
            scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value).transpose(1, 2), weights


def _repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, K, T, D) -> (B, K·groups, T, D): every kv head once per query head of its group."""
    batch, kv_heads, tokens, size = states.shape
    repeated = states[:, :, None].expand(batch, kv_heads, groups, tokens, size)
    return repeated.reshape(batch, kv_heads * groups, tokens, size)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
