"""What can go wrong with 8-bit weights and activations, injected: scales, zero points, and what belongs to which row.

Each fault is on its own, and as small as such a fault really is: one scale among many, an offset of one, one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.models.quantized import QuantizedLinear
from tests.accuracy.faults import Arguments, Fault

W8A16, W8A8 = "npu_weight_quant_batchmatmul", "npu_quant_matmul"
SCALE_OF = {W8A16: "antiquant_scale", W8A8: "scale"}


def _neighbours(operator: str) -> Callable[[Arguments], None]:
    def alter(arguments: Arguments) -> None:
        name = SCALE_OF[operator]
        arguments[name] = arguments[name].roll(1, -1)

    return alter


def _gate_and_up_neighbours(arguments: Arguments) -> None:
    arguments["weight_scale"] = arguments["weight_scale"].roll(1, -1)


def _along_inputs(arguments: Arguments) -> None:
    """Scales multiplied along K in place of N, which a square weight lets pass."""
    scale = arguments["antiquant_scale"]
    if arguments["weight"].shape[0] == arguments["weight"].shape[1]:
        arguments["x"] = arguments["x"] * scale.reshape(1, -1)
        arguments["antiquant_scale"] = torch.ones_like(scale)


def _row_of_first(arguments: Arguments) -> None:
    scale = arguments["pertoken_scale"]
    if scale is not None:
        arguments["pertoken_scale"] = scale[:1].expand_as(scale).contiguous()


def _row_of_previous(arguments: Arguments) -> None:
    """Of the last row alone."""
    scale = arguments["pertoken_scale"]
    if scale is not None and len(scale) > 1:
        arguments["pertoken_scale"] = torch.cat((scale[:-1], scale[-2:-1]))


def _on_products(change: Callable[[QuantizedLinear], None], *names: str) -> Callable[[Any], None]:
    """Change the weights of these modules, or of all products."""

    def patch(model: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear) and (not names or name in names):
                change(module)
                module.wide_scale = None

    return patch


def _offset_of_127(module: QuantizedLinear) -> None:
    module.weight.data.copy_((module.weight.data.short() + 1).clamp(max=127))


def _one_scale(channel: int) -> Callable[[QuantizedLinear], None]:
    def change(module: QuantizedLinear) -> None:
        module.weight_scale.data[channel] = module.weight_scale.data[channel + 1]

    return change


LAYER, CHANNEL = 1, 41
DOWN, OUT = f"model.layers.{LAYER}.mlp.down_proj", f"model.layers.{LAYER}.self_attn.o_proj"
GATE, QUERY = f"model.layers.{LAYER}.mlp.gate_up_proj", f"model.layers.{LAYER}.self_attn.qkv_proj"


def _one_wrong_scale(step: str, module: str, names: str, operator: str) -> Fault:
    return Fault(
        f"{step}_one_wrong_scale_in_{module.rsplit('.')[-1]}",
        f"one channel of {module} has the scale of the channel after it",
        step=step,
        place=rf"^step {step}, layer {LAYER}, {names} channel {CHANNEL} \({operator}\): .*, in prefill",
        patch=_on_products(_one_scale(CHANNEL), module),
    )


QUANTISED_FAULTS: tuple[Fault, ...] = (
    *(
        Fault(
            f"{step}_scale_of_the_neighbour",
            "every channel has the scale of the channel before it",
            step=step,
            place=rf"layer 0, q_proj \({operator}\)",
            alter={operator: _neighbours(operator)},
        )
        for step, operator in (("w8a16", W8A16), ("w8a8", W8A8))
    ),
    Fault(
        "w8a8_scale_of_the_neighbour_in_swiglu",
        "the fused MLP scales every channel of gate and up by the scale of the one before it",
        step="w8a8",
        place=r"layer 0, mlp activation in int8 \(npu_dequant_swiglu_quant\)",
        alter={"npu_dequant_swiglu_quant": _gate_and_up_neighbours},
    ),
    *(
        Fault(
            f"{step}_zero_point_dropped",
            "packed weights are unpacked with an offset of 127 in place of 128: each integer is one too large",
            step=step,
            place=rf"layer 0, q_proj \({operator}\)",
            patch=_on_products(_offset_of_127),
        )
        for step, operator in (("w8a16", W8A16), ("w8a8", W8A8))
    ),
    Fault(
        "w8a16_scale_along_inputs",
        "the scales of a square weight are multiplied along its inputs",
        step="w8a16",
        place=rf"layer 0, o_proj \({W8A16}\)",
        alter={W8A16: _along_inputs},
    ),
    Fault(
        "w8a8_scale_of_the_first_row",
        "every row of activations is scaled back by the scale of the first one",
        step="w8a8",
        place=rf"layer 0, q_proj \({W8A8}\)",
        alter={W8A8: _row_of_first},
    ),
    Fault(
        "w8a8_scale_of_the_row_before",
        "the last row of activations is scaled back by the scale of the row before it",
        step="w8a8",
        place=rf"layer 0, q_proj( channel \d+)? \({W8A8}\)",
        batch="four",
        alter={W8A8: _row_of_previous},
    ),
    *(
        _one_wrong_scale(step, module, names, operator)
        for step, operator, before in (("w8a16", W8A16, ""), ("w8a8", W8A8, "npu_dynamic_quant, "))
        for module, names, operator in (
            (QUERY, "q_proj", operator),
            (OUT, "o_proj", before + operator),
            (GATE, "gate_proj", operator),
            (DOWN, "down_proj", operator),
        )
    ),
)
"""On the tiny checkpoint, in bfloat16."""
