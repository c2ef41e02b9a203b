"""The judge of single channels, on layers written by hand: each bound up to its limit, and what is looked at."""

from __future__ import annotations

from dataclasses import replace
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
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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


@pytest.mark.parametrize("name", PRODUCTS)
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


@pytest.mark.parametrize("columns", [slice(0, -1), [*range(256), 0]], ids=["one less", "one more"])
def test_another_shape_is_wrong(columns: Any) -> None:
    of = layer()
    given = points(of)
    assert judge(of, given | {"o_proj": Point(7, "o_proj", given["o_proj"].values[:, columns])}).name == "o_proj"


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


def test_errors_are_in_units_of_each_token() -> None:
    """Tokens of RMS 3, 0 and 3000: the second counts as it is, and the third no more than the first."""
    true = np.array([[3.0, -3.0], [0.0, 0.0], [3000.0, 3000.0]])
    stock = true + np.array([[0.3, 0.0], [0.0, 0.5], [0.0, 600.0]])
    ours = true + np.array([[0.03, 0.0], [0.2, 0.0], [90.0, 0.0]])
    error, noise = channel_errors(ours, stock, true, torch.float32)
    assert error == pytest.approx([np.sqrt((0.01**2 + 0.2**2 + 0.03**2) / 3), 0.0], rel=1e-12)
    own = np.sqrt(np.array([0.1**2, 0.5**2 + 0.2**2]) / 3)
    # Both channels have the size of the token in the two tokens that are not zero: the usual noise is the same in both.
    assert noise == pytest.approx(np.maximum(own, np.sqrt((own**2).mean())), rel=1e-12)


def test_the_noise_is_at_least_that_of_rounding_and_in_the_same_units() -> None:
    """Tokens of RMS 2^-6 and 2^10, 2^-9 and 2^-11 of which bfloat16 cannot hold; what is usual goes with the size."""
    size = np.array([[2.0**-6], [2.0**10]])
    true = size * np.array([[1.0, 1.0], [1.0, 1.0]])
    true[:, 0] *= 1 + np.array([2.0**-9, 2.0**-11])
    _, noise = channel_errors(true, true, true, torch.bfloat16)
    own = np.sqrt((2.0**-18 + 2.0**-22) / 2)
    assert noise == pytest.approx([own, own / np.sqrt(2)], rel=5e-3)
    true = np.array([[3.0, 0.0], [0.0, 3000.0]])  # of one size, each in a token of its own
    _, noise = channel_errors(true, true + np.array([[0.3, 0.0], [0.0, 0.0]]), true, torch.float32)
    own = 0.3 / 3
    assert noise == pytest.approx([own, own / np.sqrt(2)], rel=1e-9)


def test_the_worst_is_the_one_farthest_beyond_its_own_noise() -> None:
    allowed = RMS_FACTOR * 10 ** (12 / TOKENS)
    point = Point(3, "q_proj", np.zeros((TOKENS, 6)))
    noise = np.array([1.0, 0.01, 1.0, 0.0, 1.0, 1.0])
    error = np.array([5.0, 0.3, 0.0, 0.0, 0.0, 0.0]) * allowed
    found: Any = channels._worst(point, error, noise)
    assert (found.channel, found.error.optimised, found.error.noise, found.error.floor) == (1, error[1], 0.01, 0.0)
    for bad in (np.nan, np.inf):
        error[4] = bad
        found = channels._worst(point, error, noise)
        assert found.channel == 4
    error[3], error[4] = 1e-9, 0.0  # of a channel without noise any error is too much
    found = channels._worst(point, error, noise)
    assert found.channel == 3


def test_exactly_the_limit_is_allowed_and_exactly_half_are_single_channels() -> None:
    point = Point(3, "q_proj", np.zeros((TOKENS, 4)))
    noise, allowed = np.ones(4), RMS_FACTOR * 10 ** (channels.CHANCE / TOKENS)
    assert channels._worst(point, allowed * noise, noise) is None
    error = np.array([2.0, 3.0, 0.0, 0.0]) * allowed
    found: Any = channels._worst(point, error, noise)
    assert found.channel == 1
    error[2] = 2 * allowed
    found = channels._worst(point, error, noise)
    assert (found.channel, found.error.optimised, found.error.noise, found.error.floor) == (
        None, np.sqrt(np.mean(error**2)), 1.0, 0.0,
    )  # fmt: skip


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


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_in_int8_is_held_against_the_norm(norm: str) -> None:
    of = layer(rounded=True)
    residual = Point(7, f"residual into {norm}", rows(256, 1))
    with torch.no_grad():
        exactly = of.true.model.layers[0].get_submodule(norm)
        normed = exactly(torch.from_numpy(residual.values).double()).numpy()
    name = f"{norm}{IN_INT8}"
    assert judge(of, {residual.name: residual, name: Point(7, name, in_int8(normed))}) is None
    wrong = in_int8(normed) * 1.1
    assert judge(of, {residual.name: residual, name: Point(7, name, wrong)}).name == name


def test_errors_of_rows_in_int8_are_in_steps_of_each_row() -> None:
    """Rows with a largest value of 127, 1 and 0; the last has no step."""
    true = np.array([[127.0, 0.0], [1.0, -0.5], [0.0, 0.0]])
    ours = true + np.array([[0.0, 0.5], [0.0, 0.25 / 127], [0.0, 0.125]])
    error, noise = channels._int8_errors(ours, true)
    assert error == pytest.approx([0.0, np.sqrt((0.5**2 + 0.25**2 + 0.125**2) / 3)], rel=1e-12)
    assert noise == pytest.approx([12**-0.5] * 2)


@torch.no_grad()
def test_what_came_in_int8_is_not_rounded_again() -> None:
    """Also where it does not lie on the integers that it should: that is the fault of what made it."""
    of = layer(rounded=True)
    values = rows(96, 5)
    for name in ("mlp activation" + IN_INT8, "mlp activation"):
        expected, _ = of._product("down_proj", {name: Point(7, name, values)}, torch.bfloat16)
        given = torch.from_numpy(
            values.astype(np.float64) if name.endswith(IN_INT8) else in_int8(values.astype(np.float64))
        )
        right = of.true.model.layers[0].mlp.down_proj(given).numpy()
        np.testing.assert_allclose(expected, right, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_product_of_ordinary_weights_is_given_what_there_is() -> None:
    of = layer(rounded=True)
    assert of.rounding is not None
    of = replace(of, rounding=replace(of.rounding, covers=lambda name: not name.endswith("down_proj")))
    values = rows(96, 5)
    expected, _ = of._product("down_proj", {"mlp activation": Point(7, "", values)}, torch.bfloat16)
    assert np.array_equal(expected, of.true.model.layers[0].mlp.down_proj(torch.from_numpy(values).double()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_ranks_are_rounded_before_they_are_added(ranks: int) -> None:
    """Their noise is that of so many roundings, of sums that may be larger than the whole."""
    of, alone = layer(ranks), layer()
    given = {"attention": Point(7, "attention", rows(256, 9))}
    with torch.no_grad():
        (true, together), (same, single) = (each._product("o_proj", given, torch.bfloat16) for each in (of, alone))
    assert np.array_equal(true, same)
    assert np.abs(together - true).mean() > 1.2 * np.abs(single - true).mean()
    assert np.abs(together - true).mean() < ranks * 2 * np.abs(single - true).mean()
