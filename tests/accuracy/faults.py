"""Negative controls: the faults that the accuracy suite exists for, each injected on purpose.

A check that has never been seen to fail proves nothing. Every record says what is broken, on which step of the ladder
and which batch it shows, and what the explanation must name for the fault to count as caught. Most act on calls of
``torch.ops.npu.*`` from outside; the product code has no hooks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qwen2_npu.conformance.accuracy.intermediates import npu_operator
from qwen2_npu.conformance.accuracy.locate_error import BuildModel

Arguments = dict[str, Any]
Alter = Callable[[Arguments], None]
"""Changes the arguments of one operator call in place, by name."""


@dataclass(frozen=True)
class Fault:
    """One fault. ``alter``: operator -> what happens to its arguments. ``patch``: what happens to a new model."""

    name: str
    description: str
    step: str
    """The step of the ladder that the message must name: the first one on which the fault acts."""
    place: str
    """Regular expression that the message must match."""
    batch: str = "one"
    alter: Mapping[str, Alter] = field(default_factory=dict)
    patch: Callable[[Any], None] | None = None

    def active(self) -> AbstractContextManager[Any]:
        """Within it, the altered operators are called."""
        return Intercept(self.alter)

    def building(self, build: BuildModel) -> BuildModel:
        """``build`` whose models are patched."""

        def built(optimizations: Any) -> Any:
            model = build(optimizations)
            if self.patch is not None:
                self.patch(model)
            return model

        return built


class Intercept(TorchFunctionMode):
    """Alters the arguments of npu operators on their way to the kernel. Eager only: graphs are traced below it."""

    def __init__(self, alter: Mapping[str, Alter]) -> None:
        super().__init__()
        self.alter = alter
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        alter = self.alter.get(npu_operator(func) or "")
        if alter is None:
            return func(*args, **kwargs)
        self.calls += 1
        schema = getattr(func, "default", func)._schema.arguments
        positional = [argument.name for argument in schema if not argument.kwarg_only]
        arguments = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        arguments |= dict(zip(positional, args, strict=False)) | kwargs
        alter(arguments)
        given = [arguments.pop(name) for name in positional if name in arguments]
        return func(*given, **arguments)


def _swap_rope_halves(arguments: Arguments) -> None:
    # x·cos + (x₂, −x₁)·sin in place of x·cos + (−x₂, x₁)·sin
    name = "sin" if "sin" in arguments else "r2"
    arguments[name] = -arguments[name]


def _invert_mask(arguments: Arguments) -> None:
    if arguments.get("atten_mask") is not None:
        arguments["atten_mask"] = ~arguments["atten_mask"].bool()


def _next_slot(arguments: Arguments) -> None:
    arguments["indices"] = arguments["indices"] + 1


def _larger_epsilon(arguments: Arguments) -> None:
    arguments["epsilon"] = 10 * arguments["epsilon"]


def _modulo_heads(arguments: Arguments) -> None:
    """Head h reads kv head h % K: expand k and v so, one kv head per query head. BSND."""
    heads = arguments["num_heads"]
    order = torch.arange(heads, device=arguments["key"].device) % arguments["num_key_value_heads"]
    arguments["key"], arguments["value"] = (arguments[name].index_select(2, order) for name in ("key", "value"))
    arguments["num_key_value_heads"] = heads


def _longest_row_for_all(arguments: Arguments) -> None:
    lengths = arguments.get("actual_seq_lengths")
    if lengths is not None:
        arguments["actual_seq_lengths"] = [max(lengths)] * len(lengths)


def _swap_k_and_v(model: Any) -> None:
    """The fused weight stacked [q; v; k], split as [q; k; v]."""
    if not model.optimizations.fused_qkv:
        return
    for layer in model.model.layers:
        attention = layer.self_attn
        for parameter in (attention.qkv_proj.weight, attention.qkv_proj.bias):
            query, key, value = parameter.data.split(attention.widths)
            parameter.data = torch.cat((query, value, key))


def _late_rotary_position(model: Any) -> None:
    """Shared cos and sin of a decode step taken one position back."""
    if not model.optimizations.flash_attention:
        return
    rotary = model.model.rotary
    right = rotary.forward
    rotary.forward = lambda position_ids, **kwargs: right(position_ids - int(position_ids.shape[1] == 1), **kwargs)


def _last_column(model: Any) -> None:
    """logits_to_keep=1 takes the last column of the compacted rows, which is padding in all but the longest."""
    if not model.optimizations.last_token_logits:
        return
    right = model._logits

    def logits(hidden_states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return right(hidden_states, None if index is None else torch.full_like(index, hidden_states.shape[1] - 1))

    model._logits = logits


def _position_before(model: Any) -> None:
    """The last layer computes the position before the one whose logits are kept."""
    for layer in model.model.layers:
        right = layer.forward

        def forward(*given: Any, right: Any = right) -> Any:
            *rest, kept = given
            return right(*rest, None if kept is None else (kept - 1).clamp(min=0))

        layer.forward = forward


def _value_turned(model: Any) -> None:
    """The heads of v get the angles of q and k in a decode step."""
    for layer in model.model.layers:
        attention = layer.self_attn

        def turned(hidden_states: torch.Tensor, cos_sin: Any, right: Any = attention._project_and_rotate) -> Any:
            return right(hidden_states, [table[:, :, :1].expand_as(table) for table in cos_sin])

        attention._project_and_rotate = turned


def _next_slot_of_block(arguments: Arguments) -> None:
    arguments["slot_mapping"] = arguments["slot_mapping"] + 1


FAULTS: tuple[Fault, ...] = (
    Fault(
        "rope_halves_swapped",
        "the rotary operator rotates by (x2, -x1) in place of (-x2, x1)",
        step="flash_attention",
        place=r"layer 0, query \(npu_(apply_rotary_pos_emb|rotary_mul)",
        alter={"npu_apply_rotary_pos_emb": _swap_rope_halves, "npu_rotary_mul": _swap_rope_halves},
    ),
    Fault(
        "mask_inverted",
        "attention keeps what the mask drops",
        step="flash_attention",
        place=r"layer 0, attention \(npu_prompt_flash_attention\)",
        alter={"npu_prompt_flash_attention": _invert_mask, "npu_incre_flash_attention": _invert_mask},
    ),
    Fault(
        "kv_one_slot_off",
        "keys and values are written one slot behind their place",
        step="fixed_kv_cache",
        place=r"layer 0, key \(.*scatter_update_.*\).*decode step 0",
        alter={"scatter_update_": _next_slot},
    ),
    Fault(
        "qkv_split_order",
        "the fused product is stacked q, v, k and split as q, k, v",
        step="fused_qkv",
        place=r"layer 0, k_proj \(linear\)",
        patch=_swap_k_and_v,
    ),
    Fault(
        "norm_epsilon",
        "both norm operators run with 10 × epsilon",
        step="add_rms_norm",
        place=r"layer 0, input_layernorm \(npu_rms_norm\)",
        alter={"npu_rms_norm": _larger_epsilon, "npu_add_rms_norm": _larger_epsilon},
    ),
    Fault(
        "rotary_position",
        "cos and sin of a decode step are those of the position before",
        step="flash_attention",
        place=r"layer 0, query \(npu_(apply_rotary_pos_emb|rotary_mul).*decode step 0",
        patch=_late_rotary_position,
    ),
    Fault(
        "padding_attended",
        "actual_seq_lengths of the longest row for every row: short rows attend to what padding left in the cache",
        step="ifa_tiling",
        place=r"layer 0, attention \(npu_incre_flash_attention\).*decode step 0",
        batch="ragged",
        alter={"npu_incre_flash_attention": _longest_row_for_all},
    ),
    Fault(
        "gqa_modulo",
        "query head h reads kv head h % K in place of h // (N / K)",
        step="flash_attention",
        place=r"layer 0, attention \(npu_prompt_flash_attention\)",
        alter={"npu_prompt_flash_attention": _modulo_heads, "npu_incre_flash_attention": _modulo_heads},
    ),
    Fault(
        "last_token_index",
        "prefill keeps the logits of the last column, which under padding is not the last token",
        step="last_token_logits",
        place=r"logits_to_keep=1",
        batch="ragged",
        patch=_last_column,
    ),
    Fault(
        "kept_position",
        "the last layer of a prefill computes the position before the one whose logits are kept",
        step="last_layer",
        place=r"logits_to_keep=1",
        batch="ragged",
        patch=_position_before,
    ),
    Fault(
        "value_turned",
        "the rotary operator over the heads of q, k and v turns v, too",
        step="one_rotary",
        place=r"layer 0, value \(npu_rotary_mul, scatter_update_\).*decode step 0",
        patch=_value_turned,
    ),
    Fault(
        "kv_slot_of_another_token",
        "keys and values of a decode step are written one slot behind their place",
        step="kv_scatter",
        place=r"layer 0, key \(.*npu_scatter_pa_kv_cache\).*decode step 0",
        alter={"npu_scatter_pa_kv_cache": _next_slot_of_block},
    ),
)
