"""What 8 bits cost, held against whole models with their weights exchanged by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.conformance.accuracy.quantised import Dequantised, InputRounding, as_meant
from qwen2_npu.conformance.accuracy.quantising_cost import Comparable, measure
from tests.unit.conformance.accuracy.int8_source import Int8Source
from tests.unit.quantised import quantised_config
from tests.unit.small import small_stock, stock_weights

WINDOWS = [list(range(3, 23)), list(range(40, 57)), list(range(90, 99))]
ALONE = 2
"""Windows that each module is measured on."""
IGNORED = ("lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj")


def covers(module: str) -> bool:
    return "proj" in module and module not in IGNORED


def given(scheme: str, **changes: torch.Tensor) -> tuple[Comparable, Any]:
    """Checkpoints of random weights, and the floating-point model. ``changes``: to the quantised one."""
    model = small_stock()
    state = stock_weights(model)
    meant, _, rounding = as_meant(Int8Source(quantised_config(scheme, IGNORED), state | changes, covers), torch.float32)
    assert isinstance(meant, Dequantised)
    floating = StateDictSource(model.config, state, where="the floats")
    return Comparable(meant, floating, "the floats", scheme, rounding, WINDOWS), model


def log_probabilities(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [F.log_softmax(model(torch.tensor([window])).logits[0].double(), -1) for window in WINDOWS]


def kl(true: list[torch.Tensor], found: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(t.exp() * (t - f)).sum(-1) for t, f in zip(true, found, strict=True)])


def losses(found: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([-f[torch.arange(len(w) - 1), w[1:]] for f, w in zip(found, WINDOWS, strict=False)])


def with_weights(model: Any, source: Dequantised, modules: set[str], rounding: InputRounding | None) -> Any:
    """What a model with these modules in 8 bits says."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = small_stock()
    for module in modules:
        state[f"{module}.weight"] = source.read([f"{module}.weight"])[f"{module}.weight"].float()
    changed.load_state_dict(state)
    if rounding is None:
        return log_probabilities(changed)
    with InputRounding(lambda name: name in modules, rounding.config).of(changed):
        return log_probabilities(changed)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_the_whole_and_each_module_alone(scheme: str) -> None:
    comparable, model = given(scheme)
    said: list[str] = []
    cost = measure(comparable, progress=said.append)
    true = log_probabilities(model)
    every = {name.removesuffix(".weight") for name in comparable.quantised.scaled}
    assert cost.modules.keys() == every
    assert len(every) == 3 * 7 - 1
    for modules, effect, count in [(every, cost.whole, 3), *(({n}, e, ALONE) for n, e in cost.modules.items())]:
        found = with_weights(model, comparable.quantised, modules, comparable.rounding)[:count]
        expected, loss = kl(true[:count], found), losses(found)
        assert effect.kl == pytest.approx(expected.mean().item(), rel=1e-2), modules
        assert effect.kl_max == pytest.approx(expected.max().item(), rel=1e-2)
        assert effect.perplexity == pytest.approx(loss.mean().exp().item(), rel=1e-5)
        assert effect.loss == pytest.approx((loss.mean() - losses(true[:count]).mean()).item(), abs=1e-5)
        same = torch.cat([f.argmax(-1) == t.argmax(-1) for f, t in zip(found, true, strict=False)])
        assert effect.agreement == pytest.approx(same.float().mean().item())
    assert cost.tokens == sum(len(window) - 1 for window in WINDOWS)
    assert cost.perplexity == pytest.approx(losses(true).mean().exp().item(), rel=1e-5)
    assert cost.left_out == ""
    assert [label.split(",")[0] for label in said] == ["layer 1 of 3", "layer 2 of 3", "layer 3 of 3", "head"]


def test_rounding_activations_costs_more() -> None:
    weights, both = (measure(given(scheme)[0]) for scheme in ("w8a16", "w8a8"))
    assert both.whole.kl > 1.5 * weights.whole.kl > 0
    assert weights.perplexity == both.perplexity


def test_the_costliest_are_those_of_the_largest_kl() -> None:
    """One weight has an outlier in each row, which takes the other ones their precision."""
    name = "model.layers.2.self_attn.v_proj.weight"
    comparable, model = given("w8a16")
    state = stock_weights(model)
    state[name] = state[name].clone()
    state[name][:, 0] = 3.0
    changed = Int8Source(comparable.quantised.inner.config, state, covers)
    changed.state["model.layers.2.self_attn.v_proj.weight"][:, 0] = 0
    cost = measure(replace(comparable, quantised=Dequantised(changed, torch.float32)))
    assert [module for module, _ in cost.costliest(1)] == [name.removesuffix(".weight")]
    assert len(cost.costliest(5)) == 5
    kinds = cost.by_kind()
    assert next(iter(kinds)) == "self_attn.v_proj"
    assert len(kinds) == 7
    assert math.isclose(sum(kinds.values()), sum(effect.kl for effect in cost.modules.values()))


def test_modules_are_not_exchanged_where_the_norms_are_others() -> None:
    """Some tools scale a norm by what they take off the weights after it: only all of them together are the model."""
    name = "model.layers.1.input_layernorm.weight"
    comparable, _ = given("w8a16", **{name: 2 * stock_weights(small_stock())[name]})
    cost = measure(comparable)
    assert not cost.modules
    assert cost.left_out == f"{name} is another one in the floats: no module fits there alone"
    assert cost.whole.kl > 0
