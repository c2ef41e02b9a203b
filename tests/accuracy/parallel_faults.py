"""Negative controls of tensor parallelism: the ways in which ranks can hold, or add up, the wrong parts.

Each is as small as it can be: in the last of the layers alone, where no later layer makes it larger. Several are what
the guide's recipe gives when one of its steps is left out; docs/parallel-accuracy.md says which, and what the guide's
note on one row of the 72B has to do with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen2_npu import Optimizations
from qwen2_npu.parallel.collectives import ALONE
from qwen2_npu.parallel.sharding import Shard

EAGER, GRAPH = "eager", "graph"

Layout = Callable[[list[Tensor], Shard, Any], Tensor]
"""The whole q, k and v of one layer (weights or biases), a rank and the configuration -> what the rank is given."""

Patch = Callable[[Any, Any], None]
"""What happens to the last layer of a rank's model; the second argument is the model."""


@dataclass(frozen=True)
class ParallelFault:
    """One fault. ``layout``: how the fused qkv rows come to the ranks. ``patch``: what else happens to the last layer.

    Attributes:
        kinds: which tensors of qkv the layout is applied to.
        modes: in which it must be seen. What is wrong in the weights is wrong in every mode.
        optimizations: the switches with which it is there.
    """

    name: str
    description: str
    ranks: int = 2
    layout: Layout | None = None
    kinds: tuple[str, ...] = ("weight", "bias")
    patch: Patch | None = None
    modes: tuple[str, ...] = (EAGER, GRAPH)
    optimizations: Optimizations = field(default_factory=lambda: Optimizations.up_to("fused_qkv"))

    def apply(self, model: Any, state: Mapping[str, Tensor]) -> None:
        """Break ``model``, one rank's part of the weights in ``state``."""
        layer = model.model.layers[-1]
        if self.layout is not None:
            scope = f"model.layers.{len(model.model.layers) - 1}.self_attn"
            for kind in self.kinds:
                whole = [state[f"{scope}.{part}_proj.{kind}"] for part in "qkv"]
                parameter = getattr(layer.self_attn.qkv_proj, kind)
                given = self.layout(whole, model.ranks.shard, model.config)
                assert given.shape == parameter.shape, "a mistake that the shapes betray is no silent one"
                parameter.data.copy_(given)
        if self.patch is not None:
            self.patch(layer, model)


# ---- layouts ---------------------------------------------------------------------------------------------------------
def interleaved(whole: list[Tensor], ranks: int) -> Tensor:
    """The guide's ``merge_qkv_weight(tp_size=ranks)``: [q k v] of the first rank, then [q k v] of the second, ..."""
    return torch.cat([part for parts in zip(*(each.chunk(ranks) for each in whole), strict=True) for part in parts])


def right_layout(whole: list[Tensor], shard: Shard, config: Any) -> Tensor:
    """Merged for as many ranks as there are, rows cut evenly: what a rank must be given."""
    return interleaved(whole, shard.size).chunk(shard.size)[shard.rank]


def merged_for_one(whole: list[Tensor], shard: Shard, config: Any) -> Tensor:
    return interleaved(whole, 1).chunk(shard.size)[shard.rank]


def merged_for_twice_as_many(whole: list[Tensor], shard: Shard, config: Any) -> Tensor:
    return interleaved(whole, 2 * shard.size).chunk(shard.size)[shard.rank]


def merged_for_half_as_many(whole: list[Tensor], shard: Shard, config: Any) -> Tensor:
    return interleaved(whole, shard.size // 2).chunk(shard.size)[shard.rank]


def thirds(whole: list[Tensor], shard: Shard, config: Any) -> Tensor:
    """What DeepSpeed's AutoTP makes of a fused product it takes for that of GLM: q, k and v of equal size."""
    fused = torch.cat(whole)
    return torch.cat([third.chunk(shard.size)[shard.rank] for third in fused.chunk(3)])


def next_ranks_kv(whole: list[Tensor], shard: Shard, config: Any) -> Tensor:
    query, key, value = (each.chunk(shard.size) for each in whole)
    other = (shard.rank + 1) % shard.size
    return torch.cat((query[shard.rank], key[other], value[other]))


# ---- patches ---------------------------------------------------------------------------------------------------------
def _o_proj_not_reduced(layer: Any, model: Any) -> None:
    layer.self_attn.o_proj.ranks = ALONE


def _down_proj_not_reduced(layer: Any, model: Any) -> None:
    layer.mlp.down_proj.ranks = ALONE


def _bias_on_every_rank(layer: Any, model: Any) -> None:
    """v's bias moved behind attention, which is exact (its weights sum to 1): o_proj(bias), added before the sum."""
    attention = layer.self_attn
    bias = attention.qkv_proj.bias.data
    value = bias[-attention.widths[2] :]
    heads = value.view(attention.kv_heads, -1).repeat_interleave(attention.heads // attention.kv_heads, dim=0)
    whole = model.ranks.all_reduce(attention.o_proj.weight.data @ heads.flatten())
    value.zero_()
    attention.o_proj.bias = torch.nn.Parameter(whole, requires_grad=False)


def _residual_on_every_rank(layer: Any, model: Any) -> None:
    """npu_mm_all_reduce_base with the residual as ``x3`` and no addition afterwards, on every rank: in prefill."""
    attention = layer.self_attn
    residuals: list[Tensor] = []
    input_norm, output = layer.input_layernorm.forward, attention.o_proj.forward

    def remember(hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed, total = input_norm(hidden_states, residual)
        residuals[:] = [total]
        return normed, total

    def summed(input: Tensor, phase: str = "decode") -> Tensor:
        if phase == "decode":
            return output(input, phase)
        (residual,) = residuals
        hcom, weight = attention.o_proj.hcom, attention.o_proj.weight
        total = torch.ops.npu.npu_mm_all_reduce_base(input, weight.t(), hcom, x3=residual)
        return total - residual  # the norm adds it

    layer.input_layernorm.forward, attention.o_proj.forward = remember, summed


def _strides_ignored(layer: Any, model: Any) -> None:
    """In eager mode, the operators take k, a part of the fused product, for contiguous: they read the wrong rows."""
    attention = layer.self_attn
    project = attention._project

    def misread(*given: Any) -> list[Tensor]:
        query, key, value = project(*given)
        if not torch.compiler.is_compiling():
            key = key.as_strided(key.shape, torch.empty(key.shape, device="meta").stride(), key.storage_offset())
        return [query, key, value]

    attention._project = misread


PARALLEL_FAULTS: tuple[ParallelFault, ...] = (
    ParallelFault(
        "merged_for_one", "the fused rows are [q k v] of the whole layer, and cut evenly", layout=merged_for_one
    ),
    ParallelFault(
        "bias_merged_for_one",
        "the same for the bias alone, whose merge is code of its own in the guide",
        layout=merged_for_one,
        kinds=("bias",),
    ),
    ParallelFault("merged_for_twice_as_many", "merged for four ranks, loaded on two", layout=merged_for_twice_as_many),
    ParallelFault(
        "merged_for_half_as_many", "merged for two ranks, loaded on four", ranks=4, layout=merged_for_half_as_many
    ),
    ParallelFault("autotp_thirds", "AutoTP cuts the fused product into q, k and v of equal size", layout=thirds),
    ParallelFault("kv_head_of_another_rank", "query heads are given the next rank's kv heads", layout=next_ranks_kv),
    ParallelFault("o_proj_not_reduced", "no all-reduce after o_proj", patch=_o_proj_not_reduced),
    ParallelFault("down_proj_not_reduced", "no all-reduce after down_proj", patch=_down_proj_not_reduced),
    ParallelFault("bias_on_every_rank", "a bias of o_proj is added on every rank", patch=_bias_on_every_rank),
    ParallelFault(
        "residual_on_every_rank",
        "the residual is added to the product on every rank, so that it counts once per rank",
        patch=_residual_on_every_rank,
        optimizations=Optimizations.up_to("mm_all_reduce"),
    ),
    ParallelFault(
        "strides_ignored",
        "eager operators read a part of the fused product as if it were contiguous",
        patch=_strides_ignored,
        modes=(EAGER,),
    ),
)

UNBROKEN = ParallelFault(
    "unbroken", "the layout of the guide, merged for as many ranks as there are", layout=right_layout
)
"""The positive control: the same way in, and nothing wrong."""
