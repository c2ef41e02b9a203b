"""The published sizes against the stock model built from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qwen2_npu import compat
from qwen2_npu.checkpoint.weights import stock_shapes
from qwen2_npu.compat import CONFIGURATIONS
from qwen2_npu.conformance.accuracy.stock import stock_class
from qwen2_npu.conformance.sizes import MIXTURE, SIZES
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import QUANTIZED
from qwen2_npu.parallel.sharding import OF_SCALE, Shard

KNOWN = {name: size for name, size in SIZES.items() if not size.experts or MIXTURE in CONFIGURATIONS}
"""Those that the installed transformers has."""


@pytest.mark.parametrize("name", [name for name, size in KNOWN.items() if size.shards == 1])
def test_parameters_are_those_of_the_stock_model(name: str) -> None:
    size = SIZES[name]
    with torch.device("meta"):
        model = stock_class(size.config())(size.config())
    model.tie_weights()
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    assert sum(parameter.numel() for parameter in parameters.values()) == size.parameters


def test_a_shard_has_its_part() -> None:
    whole, shard = SIZES["72B"], SIZES["72B-tp8"]
    assert (shard.heads, shard.kv_heads, shard.intermediate, shard.vocab) == (8, 1, 3696, 19008)
    assert whole.parameters / 8 < shard.parameters < whole.parameters / 8 * 1.01  # norms are on every card


@pytest.mark.parametrize("name", [name for name, size in KNOWN.items() if size.shards > 1])
def test_a_shard_holds_what_a_rank_holds(name: str) -> None:
    size, config = SIZES[name], SIZES[name].config()
    rank = Shard(0, size.shards)
    held = (torch.Size(rank.shape_of(tensor, shape, config)) for tensor, shape in stock_shapes(config).items())
    assert sum(shape.numel() for shape in held) == size.parameters


def test_a_mixture_computes_a_token_with_a_quarter_of_its_parameters() -> None:
    """The model card's "57B" and "A14B"; a dense model has all of them."""
    size = SIZES["57B-A14B"]
    assert (size.parameters, size.activated) == (57_408_658_944, 14_249_270_784)
    assert size.parameters_with(size.experts) == size.parameters
    assert {name for name, size in SIZES.items() if size.activated != size.parameters} == {
        name for name in SIZES if name.startswith("57B-A14B")
    }


@pytest.mark.parametrize("count", [2, 4])
def test_a_shard_of_a_mixture_has_columns_of_every_expert_and_the_whole_router(count: int) -> None:
    whole = SIZES["57B-A14B"]
    shard = whole.shard(count)
    assert shard == SIZES[f"57B-A14B-tp{count}"]
    assert (shard.experts, shard.per_token) == (64, 8)
    assert (shard.expert_columns, shard.shared_columns) == (2560 // count, 20480 // count)
    router_and_norms = whole.layers * (65 * 3584 + 2 * 3584) + 3584
    assert shard.parameters * count == whole.parameters + (count - 1) * router_and_norms


def test_columns_of_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="57B-A14B: heads=28 cannot be split over 8 cards"):
        SIZES["57B-A14B"].shard(8)
    with pytest.raises(ValueError, match="odd: expert_columns=2561 cannot be split over 2 cards"):
        replace(SIZES["57B-A14B"], name="odd", expert_columns=2561).shard(2)


def test_a_mixture_that_transformers_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "CONFIGURATIONS", {"qwen2": CONFIGURATIONS["qwen2"]})
    with pytest.raises(UnsupportedError, match="57B-A14B is a mixture of experts, which transformers has from 5 on"):
        SIZES["57B-A14B-tp4"].config()
    assert SIZES["7B"].config().hidden_size == 3584


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7B: heads=28 cannot be split over 8 cards"):
        SIZES["7B"].shard(8)


@pytest.mark.parametrize("name", [name for name, size in KNOWN.items() if not size.experts])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_integers_and_scales_are_those_that_a_rank_holds(name: str, scheme: str) -> None:
    size, config = SIZES[name], SIZES[name].config(scheme=scheme)
    rank, shapes = Shard(0, size.shards), stock_shapes(config)
    held = {key: math.prod(rank.shape_of(key, shape, config)) for key, shape in shapes.items()}
    scales = {key: count for key, count in held.items() if key.endswith(OF_SCALE)}
    assert sum(scales.values()) == size.channels
    assert sum(held[key.removesuffix(OF_SCALE)] for key in scales) == size.quantised
    stored = sum(count * (1 if key + OF_SCALE in held else 2) for key, count in held.items())
    assert stored == 2 * size.parameters - size.saved_bytes(scheme, 2)
    assert size.saved_bytes("swiglu", 2) == 0


def test_one_card_has_all() -> None:
    assert SIZES["7B"].shard(1) is SIZES["7B"]
