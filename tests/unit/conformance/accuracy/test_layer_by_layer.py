"""Stock models layer by layer: the whole models' numbers, and one layer in memory at a time."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.checkpoint.experts import one_by_one
from qwen2_npu.checkpoint.sources import StateDictSource, open_checkpoint
from qwen2_npu.conformance.accuracy import layer_by_layer, locate_error, teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch, random_batch, random_continuation
from qwen2_npu.conformance.accuracy.layer_by_layer import Feed, LayerByLayer, at_once, layer_parameters, step_by_step
from qwen2_npu.conformance.accuracy.stock import exact, exact_reference, stock_from_state_dict
from qwen2_npu.errors import CheckpointError
from tests.unit.mixture import mixture_config, needs_mixtures
from tests.unit.small import V4, small_config, small_stock, stock_weights

STEPS = 3


def models_of(config: Any, dtype: torch.dtype) -> tuple[LayerByLayer, Any]:
    """The same weights, stored in float32, layer by layer and as a whole stock model."""
    state = one_by_one(stock_weights(small_stock(config)))
    return LayerByLayer(StateDictSource(config, state), dtype), stock_from_state_dict(config, state, dtype=dtype)


def asked(config: Any) -> tuple[Batch, np.ndarray]:
    return random_batch("ragged", config.vocab_size), random_continuation("ragged", config.vocab_size, STEPS)


SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.float16),
        ({"tie_word_embeddings": True}, torch.bfloat16),
        pytest.param(
            SLIDING, torch.float32, marks=pytest.mark.skipif(V4, reason="4.37.0 is refused with sliding windows")
        ),
    ],
    ids=["untied", "float16", "tied", "sliding"],
)
def test_bit_for_bit_the_whole_models(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = small_config(**changes)
    models, whole = models_of(config, dtype)
    batch, forced = asked(config)
    ((prompt, *steps),), ((true,),) = models.run([Feed(step_by_step(batch, forced))], [Feed(at_once(batch, forced))])
    valid = batch.attention_mask.bool().numpy()
    expected = teacher_forcing.run(whole, batch, decode_steps=STEPS, forced=forced)
    assert np.array_equal(prompt.logits[valid], expected.prefill_logits[valid])
    assert np.array_equal(prompt.hidden[valid], expected.hidden[valid])  # type: ignore[index]
    assert np.array_equal(np.concatenate([step.logits for step in steps], 1), expected.decode_logits)
    exact_trace = teacher_forcing.run_reference(exact_reference(whole, torch.float64), batch, forced)
    found = teacher_forcing.reference_trace(batch, forced, true.logits, true.hidden)
    assert found.prefill_logits.dtype == np.float64
    for name in ("prefill_logits", "hidden"):
        np.testing.assert_allclose(getattr(found, name)[valid], getattr(exact_trace, name)[valid], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.decode_logits, exact_trace.decode_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixture", [False, pytest.param(True, marks=needs_mixtures)], ids=["dense", "mixture"])
def test_intermediate_tensors_are_those_of_the_whole_models(mixture: bool) -> None:
    """Of a mixture with any experts forced on it, in the layers that have some."""
    config: Any = mixture_config(num_hidden_layers=3, mlp_only_layers=[0]) if mixture else small_config()
    models, whole = models_of(config, torch.float32)
    batch, forced = asked(config)
    forced = forced[:, :1] if mixture else forced  # which is slow
    count = forced.shape[1]
    shape = 2, len(forced), batch.input_ids.shape[1] + count, 8
    chosen = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(8), shape), axis=-1)[..., :3]
    experts = chosen if mixture else None
    reference = exact_reference(whole, torch.float64)
    expected = [locate_error.captures(whole, batch, forced, experts)]
    with exact(reference):
        expected.append(locate_error.captures(reference, batch, forced, experts))
    found: tuple[list[Any], list[Any]] = [[] for _ in range(count + 1)], [[] for _ in range(count + 1)]
    for layer, *recorders in models.points(step_by_step(batch, forced), experts):
        for side, passes in zip(found, recorders, strict=True):
            for step, recorder in enumerate(passes):
                side[step] += [point for point in recorder.points if point.layer == layer]
    for side, passes in zip(found, expected, strict=True):
        for got, recorder in zip(side, passes, strict=True):
            assert [(point.layer, point.name) for point in got] == list(recorder.by_place())
            for ours, point in zip(got, recorder.points, strict=True):
                np.testing.assert_allclose(ours.values, point.values, rtol=0, atol=1e-12)


@needs_mixtures
def test_the_experts_of_the_stock_model_are_forced_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixture_config(num_hidden_layers=2)
    models, _ = models_of(config, torch.bfloat16)
    right, said = layer_by_layer.watching, list[Any]()

    def watching(part: Any, live: Any, chosen: Any = None, **how: Any) -> Any:
        said.append(chosen)
        return right(part, live, chosen, **how)

    monkeypatch.setattr(layer_by_layer, "watching", watching)
    batch, forced = asked(config)
    (passes,), _ = models.run([Feed(step_by_step(batch, forced))], [Feed(at_once(batch, forced))])
    choices = np.concatenate([one.choices.wanted for one in passes if one.choices], axis=2)
    live = np.concatenate((batch.attention_mask.bool().numpy(), np.ones(forced.shape, bool)), axis=1)
    assert [chosen is None for chosen in said] == [True, False] * 2
    for layer, chosen in enumerate(said[1::2]):
        assert np.array_equal(chosen[0][live], choices[layer][live])


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its weights, and of the pages of its files; and without the garbage collector's help."""
    config = small_config(num_hidden_layers=6)
    small_stock(config).save_pretrained(tmp_path, safe_serialization=True, max_shard_size="300KB")
    models = LayerByLayer(open_checkpoint(tmp_path), torch.float32)
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    right, read = models._parts, models.source.read

    def noted(things: list[torch.Tensor]) -> None:
        made.extend(map(weakref.ref, things))

    def parts(prefix: str, *layers: int) -> list[Any]:
        gone = [reference() for reference in made]
        alive.append(sum(tensor.nbytes for tensor in gone if tensor is not None))
        del gone
        found = right(prefix, *layers)
        noted([parameter for part in found for parameter in part.parameters()])
        return found

    def reading(names: list[str]) -> dict[str, torch.Tensor]:
        found = read(names)
        noted(list(found.values()))
        return found

    monkeypatch.setattr(models, "_parts", parts)
    monkeypatch.setattr(models.source, "read", reading)
    batch, forced = asked(config)
    gc.disable()
    try:
        models.run([Feed(step_by_step(batch, forced))], [Feed(at_once(batch, forced))])
    finally:
        gc.enable()
    assert alive == [0] * (config.num_hidden_layers + 1)
    assert len(made) > 12 * config.num_hidden_layers


def test_size_of_a_layer() -> None:
    model = small_stock()
    assert layer_parameters(model.config) == sum(math.prod(p.shape) for p in model.model.layers[0].parameters())


@needs_mixtures
def test_the_largest_layer_counts() -> None:
    model = small_stock(mixture_config(num_hidden_layers=3, mlp_only_layers=[0, 2]))
    assert layer_parameters(model.config) == sum(math.prod(p.shape) for p in model.model.layers[1].parameters())


def test_layers_are_announced_with_their_pace() -> None:
    models, _ = models_of(small_config(num_hidden_layers=2), torch.float32)
    said: list[str] = []
    models.progress = said.append
    models.run([], [])
    assert said[0] == "layer 1 of 2"
    assert said[1].startswith("layer 2 of 2, ")
    assert said[2].startswith("head, ")
    assert all(label.endswith(" s per layer") for label in said[1:])


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
)
def test_what_is_not_finite_is_named(name: str) -> None:
    config = small_config()
    state = stock_weights(small_stock(config))
    state[name].view(-1)[-2:] = torch.tensor([float("nan"), float("inf")])
    models = LayerByLayer(StateDictSource(config, state), torch.float32, where="there")
    with pytest.raises(CheckpointError, match=rf"^there: tensor {name} has 1 NaN and 1 infinite of \d+ values in "):
        models.run([], [])


def test_what_overflows_in_the_dtype_is_named() -> None:
    config = small_config()
    state = stock_weights(small_stock(config))
    state["model.embed_tokens.weight"][0, 0] = 1e6
    models = LayerByLayer(StateDictSource(config, state), torch.float16)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has 0 NaN and 1 infinite .* in torch.float16"):
        models.run([], [])
