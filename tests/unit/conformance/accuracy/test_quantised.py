"""The stock side of 8-bit weights, held against arithmetic in numpy that shares no code with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qwen2_npu.conformance.accuracy.quantised import (
    Dequantised,
    InputRounding,
    _numbered_from,
    as_meant,
    dequantised,
    kept_in_int8,
    scaled_weights,
)
from qwen2_npu.conformance.accuracy.stock import exact, exact_reference, stock_from_state_dict
from tests.unit.conformance.accuracy.int8_source import Int8Source
from tests.unit.quantised import quantised_config
from tests.unit.small import small_config, small_stock, stock_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plainly_kept(rows: np.ndarray, widths: Sequence[int] = ()) -> np.ndarray:
    """One value after the other."""
    kept = np.zeros_like(rows)
    starts = np.cumsum([0, *(widths or [rows.shape[1]])])
    for row, values in enumerate(rows):
        for start, stop in pairwise(starts):
            scale = max(abs(value) for value in values[start:stop]) / 127
            for column in range(start, stop):
                kept[row, column] = 0.0 if scale == 0 else round(values[column] / scale) * scale
    return kept


def covers(module: str) -> bool:
    return "proj" in module and not module.endswith("layers.1.mlp.down_proj")


@pytest.fixture
def source() -> Int8Source:
    config = quantised_config("w8a8", ("lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"))
    return Int8Source(config, stock_weights(small_stock(dtype=torch.bfloat16)), covers)


# ---- activations ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("widths", [(), (3, 9), (4, 4, 4)])
def test_float64_rows_are_kept_as_arithmetic_says(widths: Sequence[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 12)) * 10.0 ** np.arange(-2, 3)[:, None]
    rows[3, :4] = 0
    # Quotients of exactly a half, which go to the even integer: 127 is the row's scale times 127.
    rows[4] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, 126.5, 125.5, 3.5, 127, 0]
    found = kept_in_int8(torch.from_numpy(rows), widths)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), plainly_kept(rows, widths), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_are_rounded_once_after_it(dtype: torch.dtype) -> None:
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, true = kept_in_int8(rows), kept_in_int8(rows.double())
    assert found.dtype == dtype
    step = rows.double().abs().amax(1, keepdim=True) / 127
    # A quotient computed in float32 may fall on the other side of a half; nothing else differs by more than a rounding.
    error = (found.double() - true).abs()
    away = error > step / 2
    assert away.float().mean() < 1e-3
    assert (error[~away] <= (true.abs() * torch.finfo(dtype).eps)[~away]).all()
    assert (error <= step * 1.01).all()


def test_a_row_of_zeros_stays() -> None:
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(kept_in_int8(torch.zeros(2, 4, dtype=dtype)), torch.zeros(2, 4, dtype=dtype))


def test_only_covered_products_round_and_only_within(source: Int8Source) -> None:
    meant, _, rounding = as_meant(source, torch.bfloat16)
    model: Any = stock_from_state_dict(meant.config, dict(meant.tensors()), dtype=torch.float64)
    given: dict[str, torch.Tensor] = {}
    got: dict[str, torch.Tensor] = {}

    def remember(where: dict[str, torch.Tensor], name: str, **how: bool) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            where[name] = inputs[0]

        return model.get_submodule(name).register_forward_pre_hook(hook, **how)

    products = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ids = torch.arange(12).view(2, 6)
    assert rounding is not None
    with torch.no_grad(), exact(model), rounding.of(model):
        for name in products:
            remember(given, name, prepend=True)
            remember(got, name)
        model(ids)
    for name in products:
        rows = given[name].reshape(-1, given[name].shape[-1]).numpy()
        expected = plainly_kept(rows) if covers(name) else rows
        np.testing.assert_allclose(got[name].reshape(rows.shape).numpy(), expected, rtol=1e-12, err_msg=name)
        assert covers(name) == (not np.array_equal(got[name].reshape(rows.shape).numpy(), rows))
    assert {name for name in products if not covers(name)} == {"lm_head", "model.layers.1.mlp.down_proj"}
    with torch.no_grad(), exact(model):
        model(ids)
    assert all(given[name] is got[name] for name in products), "rounded after its time"


def test_layers_are_numbered_as_in_the_whole_model() -> None:
    config = small_config(num_hidden_layers=1)
    model = small_stock(config)
    asked: list[str] = []
    with InputRounding(lambda name: bool(asked.append(name)), config).of(model, first_layer=17):
        pass
    assert "model.layers.17.self_attn.q_proj" in asked
    assert "lm_head" in asked
    assert not any(".0." in name for name in asked)


def test_only_numbers_of_layers_are_counted_on() -> None:
    assert _numbered_from("model.layers.2.mlp", 5) == "model.layers.7.mlp"
    for name in ("", "model", "model.layers", "model.norm.0", "score.layers.0"):
        assert _numbered_from(name, 5) == name


def test_what_is_no_product_is_not_rounded() -> None:
    """Whatever is said to be covered: the embedding is given numbers of tokens, a layer more than one input."""
    config = small_config(num_hidden_layers=1)
    model: Any = small_stock(config)
    products = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ids = torch.arange(12).view(2, 6)
    logits = []
    for covered in (lambda name: True, products.__contains__):
        with torch.no_grad(), InputRounding(covered, config).of(model):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_scale_the_parts_that_they_hold(ranks: int) -> None:
    """Of what is cut along its input; the others have the whole row on every rank."""
    config = small_config(num_key_value_heads=1, num_attention_heads=4, intermediate_size=96)
    rounding = (
        InputRounding(lambda name: True, config, ranks) if ranks > 1 else InputRounding(lambda name: True, config)
    )
    for module, width in (("self_attn.o_proj", 256), ("mlp.down_proj", 96)):
        expected = [] if ranks == 1 else [width // ranks] * ranks
        assert rounding.widths(f"model.layers.0.{module}") == expected
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert rounding.widths(f"model.layers.0.{module}") == []


# ---- weights --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_exact_products_with_the_scale_that_the_models_have(
    dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(2)
    weight = generator.integers(-127, 128, (7, 5)).astype(np.int8)
    scale = torch.from_numpy(generator.uniform(1e-4, 1e-2, (7, 1))).to(scale_dtype)
    found = dequantised(torch.from_numpy(weight), scale, dtype)
    once = scale.to(dtype).double().numpy()
    expected = np.array([[float(integer) * float(once[row, 0]) for integer in weight[row]] for row in range(7)])
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), expected)


def test_a_source_of_ordinary_weights_is_what_it_was() -> None:
    source = Int8Source(small_config(), {"model.norm.weight": torch.ones(2)}, covers)
    assert as_meant(source, torch.float32) == (source, "", None)


def test_a_source_of_8_bit_weights_is_one_of_stock_tensors(source: Int8Source) -> None:
    meant, _, rounding = as_meant(source, torch.bfloat16)
    assert isinstance(meant, Dequantised)
    assert meant.shapes() == {name: tuple(t.shape) for name, t in stock_weights(small_stock()).items()}
    assert meant.stored_dtype() == torch.bfloat16
    assert getattr(meant.config, "quantization_config", None) is None, "the stock class would look for its own reader"
    assert source.config.quantization_config, "the source's own configuration stays"
    name, kept = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    found = meant.read([kept, name])
    assert list(found) == [kept, name]
    assert torch.equal(found[name], source.state[name].double() * source.state[f"{name}_scale"].double())
    assert found[kept] is source.state[kept]
    every = dict(meant.tensors())
    assert every.keys() == meant.shapes().keys()
    assert torch.equal(every[name], found[name])
    assert rounding is not None
    assert rounding.covers(name.removesuffix(".weight"))
    assert not rounding.covers(kept.removesuffix(".weight"))


def test_the_8_bit_weights_are_read_one_at_a_time(source: Int8Source) -> None:
    meant, _, _ = as_meant(source, torch.bfloat16)
    assert isinstance(meant, Dequantised)
    found = dict(scaled_weights(meant))
    assert found.keys() == {name for name in source.state if f"{name}_scale" in source.state}
    assert len(found) == 3 * 7 - 1
    for name, weight in found.items():
        assert torch.equal(weight, source.state[name].double() * source.state[f"{name}_scale"].double())
    assert not list(scaled_weights(source)), "a source of ordinary weights has none"


def test_activations_stay_as_they_are_where_the_scheme_leaves_them(source: Int8Source) -> None:
    source.config = quantised_config("w8a16")
    assert as_meant(source, torch.bfloat16)[1:] == ("w8a16", None)


def test_the_float64_self_has_the_exact_weights_and_the_stock_model_their_roundings(source: Int8Source) -> None:
    meant, _, _ = as_meant(source, torch.bfloat16)
    assert isinstance(meant, Dequantised)
    baseline = stock_from_state_dict(meant.config, dict(meant.tensors()), dtype=torch.bfloat16)
    exactly = meant.read(sorted(meant.scaled))
    reference = exact_reference(baseline, exactly=exactly.items())
    assert len(exactly) == 3 * 7 - 1
    for name, tensor in reference.state_dict().items():
        stock = baseline.state_dict()[name]
        if name in exactly:
            assert torch.equal(tensor, exactly[name])
            assert torch.equal(stock, exactly[name].to(torch.bfloat16))
            assert not torch.equal(tensor, stock.double()), "no weight was rounded: this shows nothing"
        else:
            assert torch.equal(tensor, stock.double())
    assert copy.deepcopy(reference).dtype == torch.float64
    smaller = exact_reference(baseline, torch.float32, exactly.items()).state_dict()  # where memory is short
    assert all(torch.equal(smaller[name], tensor.float()) for name, tensor in exactly.items())
