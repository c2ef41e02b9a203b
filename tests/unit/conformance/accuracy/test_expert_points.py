"""Places of a mixture of experts are named, with faults put into weights, so that the place is known exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.conformance.accuracy import locate_error
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.accuracy.intermediates import Point
from qwen2_npu.conformance.accuracy.locate_error import FEW_ERRORS, RMS_FACTOR, SMALL_OPERATORS, ErrorRatio
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.routing import sparse_layers

SHAPE = "qwen2-57b-a14b"

pytestmark = pytest.mark.skipif(SHAPE not in SHAPES, reason="transformers 4.37.0 has no Qwen2Moe")


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.of_shape(SHAPE, decode_steps=1)


def captured(pair: ModelPair, model: Any) -> list[Any]:
    trace = pair.traces("ragged")[0]
    return locate_error.captures(model, pair.batch("ragged"), trace.forced, trace.chosen)


def test_all_models_have_the_same_points(pair: ModelPair) -> None:
    models = (pair.baseline, pair.build(Optimizations.none()), pair.build(Optimizations.all()))
    found = [captured(pair, model) for model in models]
    for step, count in enumerate((sum(pair.batch("ragged").lengths), 4)):
        places = [{place: point.values.shape for place, point in each[step].by_place().items()} for each in found]
        assert places[0] == places[1] == places[2]
        assert all(shape[0] == count for (_, name), shape in places[0].items() if name not in ("key", "value"))
        assert set(FEW_ERRORS) < {name for _, name in places[0]}
        for name in FEW_ERRORS:
            assert places[0][1, name] == places[0][0, name]


def test_operators_of_a_point_are_those_that_make_it(pair: ModelPair) -> None:
    found = captured(pair, pair.build(Optimizations.all()))[1].by_place()
    assert {name: found[1, name].operators for name in FEW_ERRORS} == {
        "router": (),
        "routing weights": ("npu_moe_gating_top_k_softmax",),
        "shared gate": (),
        "expert products": ("npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu"),
        "combination": ("npu_moe_finalize_routing",),
    }
    assert found[1, "shared mlp activation"].operators == ("npu_swiglu",)
    assert all(name in SMALL_OPERATORS for _, name in found if name in FEW_ERRORS or name.startswith("shared"))


def test_products_are_of_the_experts_by_number_and_weights_of_those_that_were_chosen(pair: ModelPair) -> None:
    """Whatever comes first in the choice of each model."""
    stock, ours = (captured(pair, model)[1].by_place() for model in (pair.baseline, pair.build(Optimizations.all())))
    for name in ("expert products", "routing weights"):
        np.testing.assert_allclose(ours[1, name].values, stock[1, name].values, atol=1e-4)
    assert (np.count_nonzero(stock[1, "routing weights"].values, axis=1) == 2).all()
    assert stock[1, "expert products"].values.shape[1] == 2 * pair.config.hidden_size


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("gate.weight", "layer 1, router (linear)"),
        ("experts.gate_up_proj", "layer 1, expert products (npu_moe_init_routing_v2, npu_grouped_matmul, npu_swiglu)"),
        ("experts.down_proj", "layer 1, expert products ("),
        ("shared_expert.gate_up_proj.weight", "layer 1, shared gate_proj (linear)"),
        ("shared_expert.down_proj.weight", "layer 1, shared down_proj (linear)"),
        ("shared_expert_gate.weight", "layer 1, shared gate (linear)"),
    ],
)
def test_layer_and_operator_are_named(pair: ModelPair, parameter: str, place: str) -> None:
    model = pair.build(Optimizations.all())
    dict(sparse_layers(model)[1].named_parameters())[parameter].data.mul_(1.01)
    found = pair.locate(model, "ragged")
    assert found is not None
    assert str(found).startswith(place)
    assert found.path == "prefill"


@pytest.mark.parametrize("name", ["none", "all"])
def test_undamaged_models_have_no_finding(pair: ModelPair, name: str) -> None:
    assert pair.locate(pair.build(getattr(Optimizations, name)()), "ragged") is None


def test_few_values_may_err_more_by_chance_and_many_may_not() -> None:
    def by_chance(name: str, values: int, ratio: float) -> bool:
        return locate_error._by_chance(ErrorRatio(ratio, 1.0, 0.0), Point(0, name, np.ones((values, 1))))

    for values, factor in ((1, 1e6), (4, 10**1.5), (12, 10**0.5), (600, 10**0.01)):
        assert by_chance("shared gate", values, RMS_FACTOR * factor * 0.999)
        assert not by_chance("shared gate", values, RMS_FACTOR * factor * 1.001)
    assert not by_chance("shared gate", 4, float("nan"))
    assert not by_chance("o_proj", 4, 1.51)


def test_the_chance_is_as_small_as_it_is_said_to_be() -> None:
    """Of 200,000 pairs of RMS errors in four values each, none differs by as much as is excused."""
    errors = torch.randn(2, 200_000, 4, generator=torch.Generator().manual_seed(0)).square().mean(-1).sqrt()
    ratio = errors[0] / errors[1]
    assert (ratio > RMS_FACTOR).float().mean() > 0.1
    assert ratio.max() < RMS_FACTOR * 10**1.5
