"""Models with 8-bit weights agree with the stock model of the same numbers at every position.

What the stock side computes: ``qwen2_npu/conformance/accuracy/quantised.py``. The default lane runs combinations that
cover all pairs of (preset, dtype, batch shape, weights); the full product is marked slow.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.conformance.accuracy.configs import SHAPES, random_state_dict
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import Pair
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy import quantised
from tests.accuracy.faults import Intercept
from tests.accuracy.matrix import pairwise
from tests.accuracy.pairs import CHECKPOINT, MIXTURE, TINY, dtypes_of
from tests.accuracy.pairs import pair_of as pair_of_option
from tests.accuracy.quantised import DTYPES, PRESETS

WEIGHTS = (TINY, "qwen2-0.5b", "qwen2-7b")
OTHERS = tuple(shape for shape in SHAPES if shape not in (*WEIGHTS, MIXTURE))
"""Run by name, or nightly."""

OPERATORS = {
    "w8a16": {"npu_weight_quant_batchmatmul"},
    "w8a8": {
        "npu_quant_matmul", "npu_dynamic_quant", "npu_add_rms_norm_dynamic_quant", "npu_dequant_swiglu_quant",
    },
}  # fmt: skip
"""Scheme -> the operators that it brings in."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"scheme", "preset"} <= set(metafunc.fixturenames):
        params = list(cases(metafunc.config))
        metafunc.parametrize(("scheme", "preset", "dtype", "shape", "weights"), params)


def cases(config: pytest.Config) -> Any:
    """The full product, with what the default lane leaves out marked slow. Of a checkpoint, those of its scheme."""
    stored = scheme_of_option(config)
    for scheme in QUANTIZED:
        dtypes = [dtype for dtype in dtypes_of(config) if dtype in DTYPES[scheme]]
        weights, others = WEIGHTS, OTHERS
        if config.option.model_path:
            weights, others = ((CHECKPOINT,) if stored == scheme else ()), ()
        axes = tuple(PRESETS[scheme]), tuple(dtypes), tuple(BATCH_SHAPES)
        default = set(pairwise(*axes, weights)) if dtypes and weights else set()
        for case in product(*axes, (*weights, *others)):
            marks = () if case in default else pytest.mark.slow
            yield pytest.param(scheme, *case, id="-".join((scheme, *case)), marks=marks)


def scheme_of_option(config: pytest.Config) -> str:
    """That of the checkpoint asked for; empty where it has none, or cannot be read."""
    try:
        found = quantization_of(open_checkpoint(config.option.model_path or tiny.path()).config)
    except (ValueError, OSError):  # the tests of the ladder say so
        return ""
    return "" if found is None else found.scheme


def pair_of(config: pytest.Config, weights: str, scheme: str, dtype: str) -> Pair:
    if weights == CHECKPOINT:
        return pair_of_option(config, weights, dtype)
    option = config.option
    return quantised.pair_of(weights, scheme, dtype, option.device, bool(option.stream), option.decode_steps)


def test_agrees_at_every_position(
    scheme: str, preset: str, dtype: str, shape: str, weights: str, pytestconfig: pytest.Config
) -> None:
    failure = pair_of(pytestconfig, weights, scheme, dtype).failure(PRESETS[scheme][preset], shape)
    assert not failure, failure


@pytest.mark.slow
@pytest.mark.slow_in_ci
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_layer_by_layer_has_the_numbers_of_the_whole(scheme: str, device: str) -> None:
    """The prompts are the same in both: of them every number is, and so is the perplexity."""
    whole, layered = (
        quantised.pair_of(TINY, scheme, "bfloat16", device, stream, decode_steps=2) for stream in (False, True)
    )
    model = whole.build(Optimizations.up_to(scheme))
    ours, theirs = (pair.compare(model, "ragged")[0] for pair in (layered, whole))
    assert ours.passed, ours.failures()
    assert ours.paths[0] == theirs.paths[0]
    assert layered.wrong_channel(model) is None
    assert whole.perplexity(model) == layered.perplexity(model)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_scheme_calls_its_operators_and_no_others(scheme: str) -> None:
    """Weights that were silently dequantised would agree with the baseline, too."""
    pair = quantised.pair_of("qwen2-0.5b", scheme, "bfloat16")
    every = set().union(*OPERATORS.values())
    for optimizations, expected in ((Optimizations.up_to(scheme), OPERATORS[scheme]), (Optimizations.all(), set())):
        called = operators_called(pair, optimizations, every)
        assert called == expected


def operators_called(pair: Pair, optimizations: Optimizations, every: set[str]) -> set[str]:
    """Those of ``every`` that one prefill and decode run."""
    called: set[str] = set()
    with Intercept({name: lambda arguments, name=name: called.add(name) for name in every}):
        pair.compare(pair.build(optimizations), "one")
    return called


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_greedy_text_and_perplexity(scheme: str, device: str) -> None:
    pair = quantised.pair_of(TINY, scheme, "bfloat16", device)
    model = pair.build(Optimizations.up_to(scheme))
    samples = pair.samples(model, tiny.prompts()[:6], max_new_tokens=24)
    assert len(samples) == 6
    failures = [sample.divergence for sample in samples if not sample.passed]
    assert not failures, failures
    perplexity = pair.perplexity(model)
    assert perplexity is not None
    assert perplexity.passed, perplexity


@pytest.mark.slow
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_compiled_agrees_at_every_position(scheme: str, device: str) -> None:
    pair = quantised.pair_of("qwen2-0.5b", scheme, "bfloat16", device)
    mode = "torchair" if device.startswith("npu") else "inductor"
    torch._dynamo.reset()
    failure = pair.failure(
        Optimizations.up_to(scheme), "ragged", build=lambda switches: compile_model(pair.build(switches), mode=mode)
    )
    assert not failure, failure


@pytest.mark.slow
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_real_size_of_the_smallest_model(scheme: str) -> None:
    """Hidden size, MLP, heads, vocabulary and depth of Qwen2-0.5B, with random weights."""
    from qwen2_npu.conformance.sizes import SIZES

    config = SIZES["0.5B"].config()
    state = random_state_dict(config, dtype=torch.bfloat16)
    weights = quantised.weights_of("random 0.5b", config, state, scheme, torch.bfloat16, "cpu")
    pair = ModelPair.of(weights, "cpu", 4)
    failure = pair.failure(Optimizations.up_to(scheme), "ragged")
    assert not failure, failure
    assert isinstance(pair.build(Optimizations.up_to(scheme)), Qwen2ForCausalLM)
