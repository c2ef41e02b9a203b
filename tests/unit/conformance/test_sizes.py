"""The published sizes against the stock model built from them."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM as StockQwen2

from qwen2_npu.conformance.sizes import SIZES, Size, size_of


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_stock_model(name: str) -> None:
    size = SIZES[name]
    with torch.device("meta"):
        model = StockQwen2(size.config())
    model.tie_weights()
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    assert sum(parameter.numel() for parameter in parameters.values()) == size.parameters
    assert Size.of(model.config, name) == size


def test_bytes_the_guide_is_about() -> None:
    assert round(2 * SIZES["7B"].parameters_per_step / 1e9, 2) == 14.14  # what a bf16 decode step reads
    assert 2 * SIZES["7B"].kv_per_token == 28 * 2 * 4 * 128 * 2
    tied = SIZES["0.5B"]
    assert tied.parameters_per_step == tied.parameters  # the head reads the embedding table


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"no model size '13B'; there are 0\.5B, 1\.5B, 7B, 72B"):
        size_of("13B")
