"""Windows, rope scaling, epsilons, continuations, crops, beams and long positions against the stock model."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.accuracy.axes import (
    BATCHES,
    DTYPES,
    LONG_MODELS,
    MODELS,
    PRESETS,
    WAYS,
    batch_of,
    compare,
    compare_long,
    pair_of,
)
from tests.accuracy.matrix import pairwise

KINDS = tuple(product(PRESETS, MODELS))
DEFAULT = set(pairwise(KINDS, DTYPES, tuple(BATCHES), tuple(WAYS)))
CASES = [
    pytest.param(
        *kind, *others, id="-".join((*kind, *others)), marks=() if (kind, *others) in DEFAULT else pytest.mark.slow
    )
    for kind, *others in product(KINDS, DTYPES, BATCHES, WAYS)
]


@pytest.mark.parametrize(("preset", "model", "dtype", "batch", "way"), CASES)
def test_agrees_at_every_position(preset: str, model: str, dtype: str, batch: str, way: str) -> None:
    ours = pair_of(model, dtype).build(PRESETS[preset])
    assert not compare(ours, model, dtype, batch, way).failures()


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("none", "bfloat16"), ("flash_attention", "float32"), ("all", "bfloat16")],
)
@pytest.mark.parametrize("model", LONG_MODELS)
def test_agrees_at_long_positions(model: str, preset: str, dtype: str) -> None:
    """Errors of an angle grow with its position: averaged over a prompt, or in a short one, they do not show."""
    ours = pair_of(model, dtype).build(PRESETS[preset])
    first, second = compare_long(ours, model, dtype)
    assert not first.failures()
    assert not second.failures()


@pytest.mark.parametrize(("preset", "model", "batch"), pairwise(tuple(PRESETS), tuple(MODELS), ("one", "ragged")))
def test_beams_are_those_of_the_stock_model(preset: str, model: str, batch: str) -> None:
    pair, given = pair_of(model, "float32"), batch_of(batch)
    call = {"attention_mask": given.attention_mask, "max_new_tokens": 7, "num_beams": 3, "num_return_sequences": 2}
    ours, stock = (
        candidate.generate(given.input_ids, do_sample=False, pad_token_id=0, **call)
        for candidate in (pair.build(PRESETS[preset]), pair.baseline)
    )
    assert torch.equal(ours, stock)
