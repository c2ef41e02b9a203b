"""Windows, rope scaling, epsilons, continuations, crops, beams and long positions against the stock model."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from tests.accuracy import quantised
from tests.accuracy.axes import (
    BATCHES,
    DTYPES,
    LONG_MODELS,
    MODELS,
    PRESETS,
    QUANTISED,
    QUANTISED_PRESETS,
    WAYS,
    batch_of,
    compare,
    compare_long,
    pair_of,
)
from tests.accuracy.matrix import pairwise

EVERY_PRESET = PRESETS | {name: each for presets in QUANTISED_PRESETS.values() for name, each in presets.items()}
KINDS = tuple(product(PRESETS, MODELS))
DEFAULT = set(pairwise(KINDS, DTYPES, tuple(BATCHES), tuple(WAYS)))
CASES = [
    pytest.param(
        *kind, *others, id="-".join((*kind, *others)), marks=() if (kind, *others) in DEFAULT else pytest.mark.slow
    )
    for kind, *others in product(KINDS, DTYPES, BATCHES, WAYS)
]


@pytest.mark.parametrize(("preset", "model", "dtype", "batch", "way"), CASES)
def test_agrees_at_every_position(preset: str, model: str, dtype: str, batch: str, way: str, device: str) -> None:
    assert not compare(built(model, dtype, preset, device), model, dtype, batch, way).failures()


def quantised_cases() -> list[Any]:
    """Each scheme in the dtypes that it is compared in; all pairs of what differs by default."""
    found: list[Any] = []
    for scheme, presets in QUANTISED_PRESETS.items():
        models = tuple(name for name, (of, _) in QUANTISED.items() if of == scheme)
        dtypes = tuple(dtype for dtype in quantised.DTYPES[scheme] if dtype != "float16")
        axes = tuple(presets), models, dtypes, tuple(BATCHES), tuple(WAYS)
        default = set(pairwise(*axes))
        found += [
            pytest.param(*case, id="-".join(case), marks=() if case in default else pytest.mark.slow)
            for case in product(*axes)
        ]
    return found


@pytest.mark.parametrize(("preset", "model", "dtype", "batch", "way"), quantised_cases())
def test_8_bit_weights_agree_at_every_position(
    preset: str, model: str, dtype: str, batch: str, way: str, device: str
) -> None:
    assert not compare(built(model, dtype, preset, device), model, dtype, batch, way).failures()


LONG_CASES = [("long", "none", "bfloat16"), ("long", "flash_attention", "float32"), ("long", "all", "bfloat16")]
if "long_window" in LONG_MODELS:
    LONG_CASES += [("long_window", "flash_attention", "bfloat16"), ("long_window", "all", "float32")]


@pytest.mark.parametrize(("model", "preset", "dtype"), LONG_CASES)
def test_agrees_at_long_positions(model: str, preset: str, dtype: str, device: str) -> None:
    """Errors of an angle grow with its position: averaged over a prompt, or in a short one, they do not show."""
    first, second = compare_long(built(model, dtype, preset, device), model, dtype)
    assert not first.failures()
    assert not second.failures()


@pytest.mark.parametrize(("preset", "model", "batch"), pairwise(tuple(PRESETS), tuple(MODELS), ("one", "ragged")))
def test_beams_are_those_of_the_stock_model(preset: str, model: str, batch: str, device: str) -> None:
    assert torch.equal(beams(built(model, "float32", preset, device), batch), stock_beams(model, batch, device))


@pytest.mark.parametrize("batch", ["one", "ragged"])
@pytest.mark.parametrize("model", QUANTISED)
def test_beams_of_8_bit_weights_are_those_of_the_stock_model(model: str, batch: str, device: str) -> None:
    scheme, _ = QUANTISED[model]
    for preset, optimizations in QUANTISED_PRESETS[scheme].items():
        assert torch.equal(
            beams(built(model, "float32", preset, device), batch), stock_beams(model, batch, device, optimizations.w8a8)
        )


@cache
def built(model: str, dtype: str, preset: str, device: str) -> Any:
    return pair_of(model, dtype, device).build(EVERY_PRESET[preset])


@cache
def stock_beams(model: str, batch: str, device: str, rounded: bool = False) -> torch.Tensor:
    with pair_of(model, "float32", device).stock(rounded) as (stock, _):
        return beams(stock, batch)


def beams(model: Any, batch: str) -> torch.Tensor:
    """The two best of three continuations per row."""
    given = batch_of(batch)
    found: torch.Tensor = model.generate(
        given.input_ids.to(model.device), attention_mask=given.attention_mask.to(model.device), do_sample=False,
        pad_token_id=0, max_new_tokens=7, num_beams=3, num_return_sequences=2,
    )  # fmt: skip
    return found.cpu()
