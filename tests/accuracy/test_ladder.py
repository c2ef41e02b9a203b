"""Every step of the ladder, alone and cumulatively, agrees with the stock model at every position.

What is compared and what is excused: ``qwen2_npu/conformance/accuracy/noise.py``. The default lane runs combinations
that cover all pairs of (optimisations, dtype, batch shape, weights); the full product is marked slow.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transformers

from qwen2_npu import LADDER, Optimizations, compile_model
from qwen2_npu.compat import CACHE_NAME, IS_V4, cache_of
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.optimizations import EXPERTS, QUANTIZED
from tests.accuracy.faults import Intercept
from tests.accuracy.matrix import pairwise
from tests.accuracy.pairs import CHECKPOINT, MIXTURE, dtypes_of, is_mixture, pair_of, weights_of

PRESETS: dict[str, Optimizations] = {
    "none": Optimizations.none(),
    **{f"up_to_{step}": Optimizations.up_to(step) for step in LADDER},
    **{f"only_{step}": Optimizations.only(step) for step in LADDER[2:]},  # the second one needs the first
    "all_with_fused_infer_attention": Optimizations.all().replace(fused_infer_attention=True),
}

EXPERT_PRESETS: dict[str, Optimizations] = {
    "none": Optimizations.none(),
    f"up_to_{LADDER[-1]}": Optimizations.up_to(LADDER[-1]),
    **{f"up_to_{step}": Optimizations.up_to(step) for step in EXPERTS},
    **{f"only_{step}": Optimizations.only(step) for step in EXPERTS},
}
"""What a mixture of experts runs by default; its other presets, which it shares with dense models, are slow."""

COMPILED_SHAPE, COMPILED_WEIGHTS, COMPILED_DTYPES = "ragged", "qwen2-0.5b", ("float32", "bfloat16")
COMPILED_BY_DEFAULT = set() if IS_V4 else {(LADDER[-1], "bfloat16")}
"""Compilation takes most of a minute: the other steps run nightly, as all do on an NPU, whose graphs tests/graph holds
against eager. With 4.37.0 tests/unit/models compiles some of them."""

COMPILED_MODE = {"npu": "torchair"}
"""Device -> mode of the compiled runs; inductor elsewhere."""

OPERATORS: dict[str, set[str]] = {
    "fixed_kv_cache": {"scatter_update_"},
    "flash_attention": {"npu_prompt_flash_attention", "npu_incre_flash_attention", "npu_rotary_mul"},
    "add_rms_norm": {"npu_rms_norm", "npu_add_rms_norm"},
    "swiglu": {"npu_swiglu"},
    "kv_scatter": {"npu_scatter_pa_kv_cache"},
}
"""Step -> the operators that it brings in, and that no step before it calls (head_dim 64)."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    names = metafunc.fixturenames
    if "preset" in names:
        every = weights_of(config)
        dense = tuple(weights for weights in every if not is_mixture(config, weights))
        sparse = tuple(weights for weights in every if is_mixture(config, weights))
        axes = dtypes_of(config), tuple(BATCH_SHAPES)
        params = cases((presets_of(config, PRESETS), *axes, dense))
        params += cases((presets_of(config, EXPERT_PRESETS), *axes, sparse))
        params += [
            pytest.param(*case, id="-".join(case), marks=pytest.mark.slow)
            for case in product(presets_of(config, PRESETS), *axes, sparse)
            if case[0] not in EXPERT_PRESETS
        ]
        if IS_V4 and not config.option.model_path:
            reason = f"transformers {transformers.__version__} has no Qwen2Moe"
            params.append(pytest.param("none", "", "", MIXTURE, id=MIXTURE, marks=pytest.mark.skip(reason=reason)))
        metafunc.parametrize(("preset", "dtype", "shape", "weights"), params)
    elif "compiled_step" in names:
        steps = [step for step in config.option.steps or LADDER if step not in QUANTIZED]  # which tests/perf times
        if config.option.model_path and is_mixture(config, CHECKPOINT):
            steps = [step for step in steps if step in EXPERTS] if config.option.steps else EXPERTS
        dtypes = [dtype for dtype in COMPILED_DTYPES if dtype in dtypes_of(config)]
        default = set() if str(config.option.device).startswith("npu") else COMPILED_BY_DEFAULT
        params = [
            pytest.param(step, dtype, marks=() if (step, dtype) in default else pytest.mark.slow)
            for step, dtype in product(steps, dtypes)
        ]
        metafunc.parametrize(("compiled_step", "dtype"), params)
    elif "dtype" in names:
        metafunc.parametrize("dtype", dtypes_of(config))


def presets_of(config: pytest.Config, presets: dict[str, Optimizations]) -> tuple[str, ...]:
    """Those of ``presets`` whose last step was asked for, by --steps."""
    if config.option.steps is None:
        return tuple(presets)
    wanted = [f"{kind}_{step}" for step in config.option.steps for kind in ("up_to", "only")]
    return tuple(name for name in wanted if name in presets)


def cases(axes: tuple[tuple[str, ...], ...]) -> list[Any]:
    """The full product, with what the default lane leaves out marked slow.

    A single step is the same with every version of transformers: 4.37.0 is compared with the steps one after another.
    """
    presets, *others = axes
    quick = tuple(name for name in presets if not (IS_V4 and name.startswith("only_")))
    default = set(pairwise(quick or presets, *others)) if all(axes) else set()
    return [
        pytest.param(*case, id="-".join(case), marks=() if case in default else pytest.mark.slow)
        for case in product(*axes)
    ]


def test_agrees_at_every_position(
    preset: str, dtype: str, shape: str, weights: str, pytestconfig: pytest.Config
) -> None:
    failure = pair_of(pytestconfig, weights, dtype).failure((PRESETS | EXPERT_PRESETS)[preset], shape)
    assert not failure, failure


def test_compiled_agrees_at_every_position(compiled_step: str, dtype: str, pytestconfig: pytest.Config) -> None:
    weights = COMPILED_WEIGHTS if COMPILED_WEIGHTS in weights_of(pytestconfig) else weights_of(pytestconfig)[0]
    pair = pair_of(pytestconfig, weights, dtype)
    torch._dynamo.reset()  # every case compiles the same functions: their graphs would reach dynamo's limit
    mode = COMPILED_MODE.get(str(pytestconfig.option.device).split(":")[0], "inductor")

    def build(optimizations: Optimizations) -> Any:
        model = pair.build(optimizations)
        return compile_model(model, mode=mode) if optimizations.fixed_kv_cache else model

    failure = pair.failure(Optimizations.up_to(compiled_step), COMPILED_SHAPE, build=build)
    assert not failure, failure


def test_greedy_text_diverges_only_at_near_ties(dtype: str, pytestconfig: pytest.Config) -> None:
    pair = pair_of(pytestconfig, weights_of(pytestconfig)[0], dtype)
    samples = pair.samples(pair.build(Optimizations.all()), tiny.prompts()[:6], max_new_tokens=24)
    if not samples:
        pytest.skip(f"{pair.name} has no tokenizer: there is no text to continue")
    failures = [sample.divergence for sample in samples if not sample.passed]
    assert not failures, failures


def test_perplexity_of_held_out_text(dtype: str, pytestconfig: pytest.Config) -> None:
    pair = pair_of(pytestconfig, weights_of(pytestconfig)[0], dtype)
    perplexity = pair.perplexity(pair.build(Optimizations.all()))
    if perplexity is None:
        pytest.skip(f"{pair.name} has no tokenizer: there is no text to measure")
    assert perplexity.passed, perplexity


@pytest.mark.parametrize("step", OPERATORS)
def test_step_calls_its_operators_and_no_step_before_it_does(step: str, pytestconfig: pytest.Config) -> None:
    """A switch that silently changes nothing would agree with the baseline, too."""
    # Random weights even with --model-path: head_dim decides which operators run.
    pair = pair_of(pytestconfig, COMPILED_WEIGHTS, dtypes_of(pytestconfig)[0])
    index = LADDER.index(step)
    before = Optimizations.up_to(LADDER[index - 1]) if index else Optimizations.none()
    called = [operators_called(pair, optimizations) for optimizations in (before, Optimizations.up_to(step))]
    assert called[1] - called[0] == OPERATORS[step]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("step", [LADDER[LADDER.index("ifa_tiling") - 1], "ifa_tiling"])
def test_incremental_attention_is_told_how_much_is_live(step: str, fused: bool, pytestconfig: pytest.Config) -> None:
    """Else tiling is of the whole cache: slower, and equal in every token."""
    pair = pair_of(pytestconfig, COMPILED_WEIGHTS, dtypes_of(pytestconfig)[0])
    seen: list[Any] = []

    def watch(name: str) -> Any:
        def alter(arguments: dict[str, Any]) -> None:
            if arguments["query"].shape[1] < 4:  # no prompt
                seen.append((arguments[name], arguments["atten_mask"] is None))

        return alter

    watched = {
        "npu_incre_flash_attention": watch("actual_seq_lengths"),
        "npu_prompt_flash_attention": watch("actual_seq_lengths_kv"),
        "npu_fused_infer_attention_score": watch("actual_seq_lengths_kv"),
    }
    model = pair.build(Optimizations.up_to(step).replace(fused_infer_attention=fused))
    ids = pair.batch("four").input_ids.to(model.device)
    with Intercept(watched), torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        model(ids[:, :1], **{CACHE_NAME: cache})
        model(ids[:, :3], **{CACHE_NAME: cache})
    layers, width = len(model.model.layers), ids.shape[1]
    assert seen[:layers] == [([width + 1] * 4, True) if step == "ifa_tiling" else (None, False)] * layers
    assert seen[layers:] == [([width + 4] * 4, False)] * layers


def operators_called(pair: Any, optimizations: Optimizations) -> set[str]:
    """The npu operators that one prefill and decode run."""
    called: set[str] = set()
    every = set().union(*OPERATORS.values())
    watch = Intercept({name: lambda arguments, name=name: called.add(name) for name in every})
    with watch:
        pair.compare(pair.build(optimizations), "one")
    return called
