"""The judge of single channels, on layers written by hand: each bound up to its limit, and what is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qwen2_npu.conformance.accuracy import channels
from qwen2_npu.conformance.accuracy.channels import INPUT_OF, LayerOfBoth, channel_errors
from qwen2_npu.conformance.accuracy.intermediates import IN_INT8, Point
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR
from qwen2_npu.conformance.accuracy.quantised import InputRounding
from tests.unit.small import small_config, small_stock

TOKENS = 68
LIMIT = RMS_FACTOR * 10 ** (12 / TOKENS)


def layer(ranks: int = 1, rounded: bool = False) -> LayerOfBoth:
    """Layer 7 of a larger model, in bfloat16 and exactly."""
    config = small_config(num_hidden_layers=1)
    stock: Any = small_stock(config, dtype=torch.bfloat16)
    true: Any = small_stock(config)
    true.load_state_dict(stock.state_dict())
    rounding = InputRounding(lambda name: name.startswith("model.layers.7."), config, ranks) if rounded else None
    return LayerOfBoth(7, stock, true.double(), 0, config, rounding, ranks)


def rows(width: int, seed: int) -> np.ndarray[Any, Any]:
    values = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.float().numpy()


def points(of: LayerOfBoth) -> dict[str, Point]:
    """A right model's, in order: each product is what the stock layer makes of the input that is there."""
    found: dict[str, Point] = {}

    def add(name: str, values: np.ndarray[Any, Any]) -> None:
        found[name] = Point(7, name, values, ("npu_x",))

    for source, width in (("input_layernorm", 256), ("attention", 256), ("post_attention_layernorm", 256)):
        add(f"residual into {source}", rows(width, 1))
        add(source, rows(width, len(source)))
        for name, (module, given) in INPUT_OF.items():
            if given == source:
                add(name, made(of, module, found[source].values))
    add("mlp activation", rows(96, 5))
    add("down_proj", made(of, "mlp.down_proj", found["mlp activation"].values))
    return found


def made(of: LayerOfBoth, module: str, given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return of.stock.model.layers[0].get_submodule(module)(torch.from_numpy(given).bfloat16()).float().numpy()


def judge(of: LayerOfBoth, given: dict[str, Point]) -> Any:
    return of.first_wrong(list(given.values()), torch.bfloat16)


def altered(given: dict[str, Point], name: str, channel: int, factor: float) -> dict[str, Point]:
    values = given[name].values.copy()
    values[:, channel] *= factor
    return given | {name: Point(7, name, values, ("npu_x",))}


def test_a_right_model_has_no_wrong_channel() -> None:
    of = layer()
    assert judge(of, points(of)) is None


@pytest.mark.parametrize("name", INPUT_OF)
def test_one_channel_of_each_product_is_seen_and_named(name: str) -> None:
    of = layer()
    given = points(of)
    found = judge(of, altered(given, name, 11, 1.05))
    assert (found.layer, found.name, found.channel) == (7, name, 11)
    assert str(found).startswith(f"layer 7, {name} channel 11 (npu_x): RMS error ")
    assert f"exceeds {LIMIT:.3g} × noise" in str(found)
    assert judge(of, altered(given, name, 11, 1.0001)) is None


def test_the_first_in_order_of_execution_is_named_and_what_it_feeds_is_not() -> None:
    """What came before a product counts as its input, however wrong it is."""
    of = layer()
    given = points(of)
    both = altered(altered(given, "down_proj", 3, 2.0), "v_proj", 5, 2.0)
    assert (judge(of, both).name, judge(of, both).channel) == ("v_proj", 5)
    wrong = given | {"attention": Point(7, "attention", rows(256, 99))}
    wrong["o_proj"] = Point(7, "o_proj", made(of, "self_attn.o_proj", wrong["attention"].values))
    assert judge(of, wrong) is None


def test_most_channels_are_the_product_as_a_whole() -> None:
    of = layer()
    given = points(of)
    values = given["k_proj"].values.copy()
    values[:, : values.shape[1] // 2 + 1] *= 1.5
    found = judge(of, given | {"k_proj": Point(7, "k_proj", values)})
    assert (found.name, found.channel) == ("k_proj", None)
    assert " channel" not in str(found)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_channel_that_is_no_number_is_wrong(bad: float) -> None:
    of = layer()
    given = points(of)
    given["up_proj"].values[4, 9] = bad
    found = judge(of, given)
    assert (found.name, found.channel) == ("up_proj", 9)


def test_another_shape_is_wrong() -> None:
    of = layer()
    given = points(of)
    assert judge(of, given | {"o_proj": Point(7, "o_proj", given["o_proj"].values[:, :-1])}).name == "o_proj"


@pytest.mark.parametrize(("beyond", "found"), [(1 - 1e-9, False), (1 + 1e-9, True)])
def test_the_error_of_a_channel_counts_up_to_its_limit(beyond: float, found: bool) -> None:
    """All tokens alike: the stock model is off by one bit in all channels, ours in one by what may just be."""
    true = np.full((TOKENS, 6), 2.0)
    noise = 2.0**-8
    stock, ours = true + noise, true + noise
    ours[:, 4] = true[:, 4] + beyond * LIMIT * noise
    error, own = channel_errors(ours, stock, true, torch.bfloat16)
    point = Point(0, "q_proj", ours)
    assert (channels._worst(point, error, own) is not None) is found
    ours[:, 4] = true[:, 4] + noise
    ours[:, 1] = true[:, 1] - beyond * LIMIT * noise
    assert (channels._worst(point, *channel_errors(ours, stock, true, torch.bfloat16)) is not None) is found


def test_a_channel_where_the_stock_model_was_lucky_has_the_noise_of_the_others() -> None:
    true = np.tile([1.0, 10.0, 1.0, 1.0], (TOKENS, 1)) * 3
    stock = true * (1 + 2.0**-6)
    stock[:, 2] = true[:, 2]
    _, noise = channel_errors(true, stock, true, torch.bfloat16)
    assert noise[2] == pytest.approx(noise[0], rel=0.2)
    assert noise[1] == pytest.approx(10 * noise[0], rel=0.2)


# ---- 8-bit activations ----------------------------------------------------------------------------------------------
def in_int8(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    return np.asarray(np.rint(values / scale) * scale)


def test_rows_in_int8_are_those_of_what_the_operator_was_given() -> None:
    of = layer(rounded=True)
    normed = Point(7, "post_attention_layernorm", rows(256, 1))
    kept = in_int8(normed.values).astype(np.float32)
    gate, up = (Point(7, name, made(of, f"mlp.{name}", kept)) for name in ("gate_proj", "up_proj"))
    product = nn.functional.silu(torch.from_numpy(gate.values).double()) * torch.from_numpy(up.values).double()
    right = in_int8(product.numpy())
    name = f"mlp activation{IN_INT8}"

    def given(values: np.ndarray[Any, Any]) -> dict[str, Point]:
        down = Point(7, "down_proj", made(of, "mlp.down_proj", values.astype(np.float32)))
        every = (normed, gate, up, Point(7, name, values, ("npu_y",)), down)
        return {point.name: point for point in every}

    assert judge(of, given(right)) is None
    wrong = right.copy()
    wrong[:, 40] += 0.9 * np.abs(right).max(axis=1) / 127  # most of a step
    found = judge(of, given(wrong))
    assert (found.name, found.channel, found.operators) == (name, 40, ("npu_y",))


def test_a_norm_in_int8_is_held_against_the_norm() -> None:
    of = layer(rounded=True)
    residual = Point(7, "residual into input_layernorm", rows(256, 1))
    with torch.no_grad():
        normed = of.true.model.layers[0].input_layernorm(torch.from_numpy(residual.values).double()).numpy()
    name = f"input_layernorm{IN_INT8}"
    assert judge(of, {residual.name: residual, name: Point(7, name, in_int8(normed))}) is None
    wrong = in_int8(normed) * 1.1
    assert judge(of, {residual.name: residual, name: Point(7, name, wrong)}).name == name


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_ranks_are_rounded_before_they_are_added(ranks: int) -> None:
    """Their noise is that of so many roundings, of sums that may be larger than the whole."""
    of, alone = layer(ranks), layer()
    given = {"attention": Point(7, "attention", rows(256, 9))}
    with torch.no_grad():
        (true, together), (same, single) = (each._product("o_proj", given, torch.bfloat16) for each in (of, alone))
    assert np.array_equal(true, same)
    assert np.abs(together - true).mean() > 1.2 * np.abs(single - true).mean()
