"""The published sizes against the stock model built from them."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM as StockQwen2

from qwen2_npu.conformance.sizes import SIZES


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size.shards == 1])
def test_parameters_are_those_of_the_stock_model(name: str) -> None:
    size = SIZES[name]
    with torch.device("meta"):
        model = StockQwen2(size.config())
    model.tie_weights()
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    assert sum(parameter.numel() for parameter in parameters.values()) == size.parameters


def test_a_shard_has_its_part() -> None:
    whole, shard = SIZES["72B"], SIZES["72B-tp8"]
    assert (shard.heads, shard.kv_heads, shard.intermediate, shard.vocab) == (8, 1, 3696, 19008)
    assert whole.parameters / 8 < shard.parameters < whole.parameters / 8 * 1.01  # norms are on every card


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7B: heads=28 cannot be split over 8 cards"):
        SIZES["7B"].shard(8)
