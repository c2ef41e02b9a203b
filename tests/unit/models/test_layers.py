"""Every weight goes through ops.linear; the rotary table outlives conversions of the model without losing digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.models import layers
from qwen2_npu.models.layers import RotaryTable
from tests.unit.small import small_config


@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_every_weight_is_multiplied_by_the_project_s_linear(optimizations, monkeypatch):
    model = Qwen2ForCausalLM(small_config(), optimizations=optimizations).eval()
    multiplied = []
    product = layers.linear
    monkeypatch.setattr(layers, "linear", lambda x, w, b: multiplied.append(w.data_ptr()) or product(x, w, b))
    model(torch.ones(1, 3, dtype=torch.int64))
    weights = [module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Linear)]
    assert sorted(multiplied) == sorted(weights)


@pytest.mark.parametrize("through", [torch.bfloat16, torch.float16])
def test_a_table_that_was_rounded_is_not_widened(through):
    config = small_config()
    table, fresh = RotaryTable(config), RotaryTable(config)
    table.prepare(torch.float32, torch.device("cpu"))
    for dtype in (through, torch.float32):
        table.to(dtype)
        table.prepare(dtype, torch.device("cpu"))
    fresh.prepare(torch.float32, torch.device("cpu"))
    assert torch.equal(table.cos, fresh.cos)
    assert torch.equal(table.sin, fresh.sin)


def test_a_table_built_in_inference_mode_is_an_ordinary_tensor():
    table = RotaryTable(small_config())
    with torch.inference_mode():
        table.prepare(torch.float32, torch.device("cpu"))
    assert not table.cos.is_inference()
