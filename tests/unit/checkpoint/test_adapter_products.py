"""Which weights an adapter is added to, with which rank and scaling, and in which precision: without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2_npu.checkpoint import adapter as adapters
from qwen2_npu.checkpoint.adapter import LowRank
from qwen2_npu.checkpoint.sources import part_of
from qwen2_npu.parallel.sharding import Slice

Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
UP = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]
MODULES = ["model.embed_tokens", *Q, *UP, "lm_head"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"target_modules": "all-linear"}, Q + UP),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, UP),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.[01]\..*"}, [Q[2], UP[2]]),
        ({"target_modules": r".*q_proj", "exclude_modules": ["1.self_attn.q_proj"]}, [Q[0], Q[2]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, Q[:1]),  # a number, and one that is false
        ({"target_modules": ["q_proj"], "layers_to_transform": [2, 0]}, [Q[0], Q[2]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": None}, Q),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, Q),
        *(
            ({"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": pattern}, UP[1:2])
            for pattern in ("layers", ["layers"], ["h", "layers"], ["layers", "h"], [], None)
        ),
        *(
            ({"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": pattern}, [])
            for pattern in ("h", ["h"])
        ),
        ({"target_modules": [Q[1], "up_proj"], "layers_to_transform": [0]}, [Q[1], UP[0]]),  # a whole name: any layer
    ],
)  # fmt: skip
def test_targets_are_taken_less_exceptions_and_other_layers(said: dict[str, Any], expected: list[str]) -> None:
    """As peft does, whichever way the targets are given."""
    assert [module for module in MODULES if adapters._targeted(said, module)] == expected


@pytest.mark.parametrize(("use_rslora", "divisor"), [(False, 4), (True, 2)])
def test_the_scaling_follows_from_the_rank_and_alpha_of_the_module_itself(use_rslora: bool, divisor: int) -> None:
    """Of several patterns that fit, the first counts, as in peft."""
    said = {
        "r": 9, "lora_alpha": 7, "use_rslora": use_rslora,
        "rank_pattern": {"k_proj": 5, "q_proj": 4, "0.self_attn.q_proj": 3},
        "alpha_pattern": {"q_proj": 6, "self_attn.q_proj": 8},
    }  # fmt: skip
    parts = {"A": torch.ones(4, 8), "B": torch.ones(6, 4)}
    assert adapters._low_rank(Q[0], parts, said, Path("adapter"), (6, 8)).scaling == 6 / divisor
    parts = {"A": torch.ones(9, 8), "B": torch.ones(6, 9)}
    assert adapters._low_rank(UP[0], parts, said, Path("adapter"), (6, 8)).scaling == 7 / (3 if use_rslora else 9)


@pytest.mark.parametrize("part", [None, Slice(0, 8, 24), Slice(1, 16, 40)], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_sum_is_computed_in_float32_at_least_whatever_is_stored(
    weight: torch.dtype, adapter: torch.dtype, part: Slice | None
) -> None:
    """And the sum of a part is that part of the sum."""
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=generator) for shape in ((32, 48), (8, 48), (32, 8)))
    w, a, b = w.to(weight), a.to(adapter), b.to(adapter)
    expected = part_of(w.double() + math.pi * (b.double() @ a.double()), part)
    found = LowRank(a, b, math.pi).added_to(part_of(w, part), part)
    eps = torch.finfo(found.dtype).eps
    assert eps <= torch.finfo(torch.float32).eps
    assert (found.double() - expected).abs().max() < 100 * eps
