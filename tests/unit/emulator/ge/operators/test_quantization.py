"""What GE operators of 8-bit weights refuse; what they compute is in test_attention.py, against the goldens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu.emulator.ge.operators.table import TABLE


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


X, WEIGHT = ones(2, 32, dtype=torch.float16), ones(32, 32, dtype=torch.int8)
COLUMNS, HALF = ones(32), ones(32, dtype=torch.float16)

USES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "WeightQuantBatchMatmulV2": (
        {"x": X, "weight": WEIGHT, "antiquant_scale": HALF},
        {"antiquant_offset", "quant_scale", "quant_offset"},
    ),
    "QuantBatchMatmulV3": ({"x1": WEIGHT, "x2": WEIGHT, "scale": COLUMNS, "dtype": 1}, {"offset"}),
    "DynamicQuant": ({"x": X}, {"group_index"}),
    "AddRmsNormDynamicQuant": ({"x1": X, "x2": X, "gamma": HALF}, {"smooth_scale1", "smooth_scale2", "beta"}),
    "DequantSwigluQuant": (
        {"x": ones(2, 64, dtype=torch.int32), "weight_scale": ones(64), "activation_scale": ones(2)},
        {"bias", "quant_scale", "quant_offset", "group_index"},
    ),
}
"""GE operator -> a use that is emulated, and its inputs that are not."""


@pytest.mark.parametrize(("type_", "name"), [(type_, name) for type_ in USES for name in sorted(USES[type_][1])])
def test_an_input_that_is_not_emulated_is_refused_by_its_name(type_: str, name: str) -> None:
    """And not left out in silence."""
    entry, given = TABLE[type_], USES[type_][0]
    optional = {parameter.name: None for parameter in entry.parameters if parameter.optional}
    entry.function(**{**optional, **given})
    with pytest.raises(ValueError, match=rf"\b{name} is a torch"):
        entry.function(**{**optional, **given, name: HALF})
