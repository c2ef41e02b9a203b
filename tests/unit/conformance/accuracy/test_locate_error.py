"""Localisation with faults put into weights, so that the place is known exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.conformance.accuracy import locate_error
from qwen2_npu.conformance.accuracy.intermediates import capturing
from qwen2_npu.conformance.accuracy.locate_error import Divergence
from qwen2_npu.conformance.accuracy.model_pair import ModelPair

DECODE_STEPS = 2


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.of_shape("qwen2-0.5b", decode_steps=DECODE_STEPS)


def damaged(pair: ModelPair, parameter: str) -> locate_error.BuildModel:
    def build(optimizations: Optimizations) -> Any:
        model = pair.build(optimizations)
        parameters = dict(model.named_parameters())
        if parameter in parameters:
            parameters[parameter].data.mul_(1.01)
        return model

    return build


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("model.layers.0.input_layernorm.weight", "layer 0, input_layernorm (npu_rms_norm)"),
        ("model.layers.1.input_layernorm.weight", "layer 1, input_layernorm (npu_add_rms_norm)"),
        ("model.layers.1.self_attn.o_proj.weight", "layer 1, o_proj (linear)"),
        ("model.layers.0.mlp.down_proj.weight", "layer 0, down_proj (linear)"),
        ("model.norm.weight", "norm (npu_add_rms_norm)"),
    ],
)
def test_layer_and_operator_are_named(pair: ModelPair, parameter: str, place: str) -> None:
    optimizations = Optimizations.up_to("add_rms_norm")
    model = damaged(pair, parameter)(optimizations)
    baseline, _ = pair.traces("ragged")
    finding = locate_error.locate(
        model, pair.baseline, pair.reference, pair.batch("ragged"), baseline.forced, torch.float32
    )
    assert finding is not None
    assert str(finding).startswith(place)
    assert finding.path == "prefill"


def test_step_is_bisected(pair: ModelPair) -> None:
    """gate_up_proj exists from fused_gate_up on only."""
    build = damaged(pair, "model.layers.1.mlp.gate_up_proj.weight")
    message = pair.failure(Optimizations.all(), "one", build=build)
    assert message.startswith("step fused_gate_up, layer 1, gate_proj (linear)")


def test_damage_without_any_optimisation_is_said_to_be_so(pair: ModelPair) -> None:
    message = pair.failure(Optimizations.all(), "one", build=damaged(pair, "model.embed_tokens.weight"))
    assert message.startswith("with every optimisation off")


@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_undamaged_models_have_no_finding_anywhere(pair: ModelPair, optimizations: Optimizations) -> None:
    baseline, _ = pair.traces("ragged")
    assert pair.failure(optimizations, "ragged") == ""
    assert pair.explain(optimizations, "ragged") is None
    assert (
        locate_error.locate(
            pair.build(optimizations),
            pair.baseline,
            pair.reference,
            pair.batch("ragged"),
            baseline.forced,
            torch.float32,
        )
        is None
    )


def test_all_models_have_the_same_points(pair: ModelPair) -> None:
    batch = pair.batch("ragged")
    places = []
    for model in (pair.baseline, pair.build(Optimizations.none()), pair.build(Optimizations.all())):
        with torch.no_grad(), capturing(model, new=batch.lengths, total=batch.lengths) as capture:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=True)
        places.append({place: point.values.shape for place, point in capture.by_place().items()})
        assert len(capture.points) == len(places[-1])
    assert places[0] == places[1] == places[2]
    assert all(shape[0] == sum(batch.lengths) for shape in places[0].values())


def test_divergence_of_free_running_tokens(pair: ModelPair) -> None:
    baseline, reference = pair.traces("four")
    chosen = baseline.forced.copy()
    assert locate_error.divergences(chosen, baseline, reference) == []
    chosen[2, 1] = (chosen[2, 1] + 1) % 512
    (found,) = locate_error.divergences(chosen, baseline, reference)
    assert (found.row, found.position) == (2, 1)
    assert found.baseline_token == baseline.forced[2, 1]
    assert found.margin == pytest.approx(
        np.diff(baseline.decode_logits[2, 0, [chosen[2, 1], baseline.forced[2, 1]]])[0]
    )
    assert not found.excused
    assert "beyond" in found.describe()


def test_divergence_reads_as_a_sentence() -> None:
    near = Divergence(0, 3, 7, 8, baseline_logits=(1.5, 1.499), noise=0.001)
    assert near.excused
    assert near.describe(lambda token: f"t{token}") == (
        "row 0 diverges after 3 tokens: baseline 7 't7' (logit 1.5), optimised 8 't8' (1.499); margin 0.001 is a "
        "near-tie, within 2 × noise 0.001"
    )
