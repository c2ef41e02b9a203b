"""Experts are taken down and forced, whatever the layout of the rows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.conformance.accuracy import locate_error, teacher_forcing, text
from qwen2_npu.conformance.accuracy.batches import random_batch
from qwen2_npu.conformance.accuracy.compare_routing import compare_routing
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.accuracy.locate_error import Divergence
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.routing import UNKNOWN, Routers, sparse_layers, watching
from qwen2_npu.conformance.accuracy.stock import exact
from qwen2_npu.conformance.accuracy.streamed_pair import StreamedPair
from tests.unit.mixture import mixture_config
from tests.unit.small import small_stock, stock_weights

SHAPE, STEPS = "qwen2-57b-a14b", 2
EVERY = {"none": Optimizations.none(), "swiglu": Optimizations.up_to("swiglu"), "all": Optimizations.all()}

pytestmark = pytest.mark.skipif(SHAPE not in SHAPES, reason="transformers 4.37.0 has no Qwen2Moe")


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.of_shape(SHAPE, decode_steps=STEPS)


@pytest.fixture(scope="module")
def others(pair: ModelPair) -> Any:
    """Experts that are nobody's choice: those after the baseline's, for every token of the ragged batch."""
    chosen = pair.traces("ragged")[0].chosen
    assert chosen is not None
    return (chosen + 5) % SHAPES[SHAPE].experts


def forced(pair: ModelPair, model: Any, chosen: Any) -> teacher_forcing.Trace:
    baseline = pair.traces("ragged")[0]
    arguments = {"decode_steps": STEPS, "forced": baseline.forced, "chosen": chosen}
    return teacher_forcing.run(model, pair.batch("ragged"), **arguments)


def test_what_the_baseline_chose_is_what_its_logits_say(pair: ModelPair) -> None:
    baseline, reference = pair.traces("ragged")
    for trace in (baseline, reference):
        for path in ("prefill", "decode"):
            said = trace.routing[path]
            assert said.layers == (0, 1)
            best = np.sort(np.argsort(said.logits)[..., -2:])
            live = baseline.valid if path == "prefill" else np.ones((4, STEPS), bool)
            np.testing.assert_array_equal(best[:, live], np.sort(said.wanted)[:, live])
    joined = np.concatenate([baseline.routing[path].wanted for path in ("prefill", "decode")], axis=2)
    np.testing.assert_array_equal(joined, baseline.chosen)


@pytest.mark.parametrize("name", EVERY)
def test_forced_experts_are_those_of_each_token_in_every_layout(pair: ModelPair, others: Any, name: str) -> None:
    """With other experts in every layer all models compute the same other thing."""
    baseline, ours = (forced(pair, model, others) for model in (pair.baseline, pair.build(EVERY[name])))
    usual = pair.traces("ragged")[0]
    assert np.abs(usual.prefill_logits - baseline.prefill_logits)[usual.valid].max() > 1
    np.testing.assert_array_equal(baseline.chosen[:, :, 17:], others[:, :, 17:])
    valid = baseline.valid
    for got, expected in (
        (ours.prefill_logits[valid], baseline.prefill_logits[valid]),
        (ours.hidden[valid], baseline.hidden[valid]),
        (ours.decode_logits, baseline.decode_logits),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalised", [False, True])
def test_weights_of_forced_experts_are_normalised_where_the_model_says_so(normalised: bool) -> None:
    config = mixture_config(norm_topk_prob=normalised)
    stock, batch = small_stock(config), random_batch("ragged", config.vocab_size)
    model = Qwen2ForCausalLM.from_state_dict(config, stock_weights(stock))
    chosen = np.broadcast_to([1, 4, 6], (1, *batch.input_ids.shape, 3))
    theirs, ours = (teacher_forcing.run(each, batch, chosen=chosen) for each in (stock, model))
    valid = theirs.valid
    np.testing.assert_allclose(ours.prefill_logits[valid], theirs.prefill_logits[valid], rtol=1e-3, atol=1e-3)


def test_the_reference_is_forced_too_and_in_float64(pair: ModelPair, others: Any) -> None:
    batch, tokens = pair.batch("ragged"), pair.traces("ragged")[0].forced
    true = teacher_forcing.run_reference(pair.reference, batch, tokens, others)
    baseline = forced(pair, pair.baseline, others)
    assert true.routing["prefill"].logits.dtype == np.float64
    np.testing.assert_allclose(true.decode_logits, baseline.decode_logits, rtol=1e-3, atol=1e-3)
    with exact(pair.reference):  # weights of other experts are not rounded to float32 on the way
        weights = [torch.rand(3, 2, dtype=torch.float64) for _ in range(2)]
        routers = Routers({0: None}, np.ones((1, 3), bool), np.full((1, 1, 3, 2), [1, 2]), left=False)
        routers.start(0, 3)
        logits = torch.randn(3, 4, dtype=torch.float64)
        weights, _ = routers.route(0, logits, weights[0], torch.zeros(3, 2, dtype=torch.int64), False)
    np.testing.assert_array_equal(weights, torch.softmax(logits, -1)[:, 1:3])
    said = routers.taken()
    assert said is not None
    np.testing.assert_array_equal(said.logits[0, 0], logits)  # the noise is measured by them
    routers.start(0, 3)
    assert routers.taken() is None, "what a pass before it said"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_are_taken_down_as_they_are(dtype: torch.dtype) -> None:
    """The noise is measured by them."""
    routers = Routers({0: None}, np.ones((1, 3), bool), None, left=False)
    routers.start(0, 3)
    logits = torch.randn(3, 4, dtype=torch.float64).to(dtype)
    routers.route(0, logits, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), False)
    said = routers.taken()
    assert said is not None
    np.testing.assert_array_equal(said.logits[0, 0], logits.double())


def test_what_is_forced_is_left_as_it_was() -> None:
    """A layer decides where nothing is forced, for itself: the array is the baseline's."""
    chosen = np.array([[[[UNKNOWN, UNKNOWN], [2, 3]]]])
    routers = Routers({0: None}, np.ones((1, 2), bool), chosen, left=False)
    routers.start(0, 2)
    routers.route(0, torch.zeros(2, 4), torch.ones(2, 2), torch.tensor([[1, 0]] * 2), False)
    assert chosen.tolist() == [[[[UNKNOWN, UNKNOWN], [2, 3]]]]
    assert routers.chosen is not None
    assert routers.chosen.tolist() == [[[[1, 0], [2, 3]]]]


@pytest.mark.parametrize("normalised", [False, True])
def test_weights_of_other_experts_are_the_model_s_own_and_its_own_choice_stands(normalised: bool) -> None:
    chosen = np.array([[[[0, 1], [2, 3]]]])
    routers = Routers({4: None}, np.ones((1, 2), bool), chosen, left=False)
    routers.start(0, 2)
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]] * 2)
    own = torch.tensor([[0.25, 0.125]] * 2)  # no softmax of these logits: what the model says is not made up again
    weights, experts = routers.route(4, logits, own, torch.tensor([[1, 0]] * 2, dtype=torch.int32), normalised)
    assert experts.tolist() == [[1, 0], [2, 3]]
    assert experts.dtype == torch.int32
    assert weights[0].tolist() == [0.25, 0.125]
    expected = torch.softmax(logits[1], -1)[[2, 3]]
    torch.testing.assert_close(weights[1], expected / expected.sum() if normalised else expected, rtol=0, atol=1e-7)
    said = routers.taken()
    assert said is not None
    assert said.wanted.tolist() == [[[[1, 0], [1, 0]]]]


def test_a_last_layer_of_one_token_per_row_is_taken_down_and_forced_there(pair: ModelPair, others: Any) -> None:
    """A prefill that wants the last logits alone, with the step last_layer: ragged rows, own choice and forced."""
    model, batch = pair.build(Optimizations.all()), pair.batch("ragged")
    baseline = pair.traces("ragged")[0]
    for chosen in (None, others):
        trace = teacher_forcing.run(
            model, batch, decode_steps=STEPS, forced=baseline.forced, last_token=True, chosen=chosen
        )
        said, whole = trace.routing["last_token"], trace.routing["prefill"]
        np.testing.assert_allclose(trace.last_logits, trace.prefill_logits[:, -1], rtol=1e-3, atol=1e-3)
        valid = baseline.valid
        np.testing.assert_array_equal(said.wanted[0][valid], whole.wanted[0][valid])
        assert (said.wanted[1, :, :-1] == UNKNOWN).all()
        np.testing.assert_array_equal(said.wanted[1, :, -1], whole.wanted[1, :, -1])
        np.testing.assert_allclose(said.logits[1, :, -1], whole.logits[1, :, -1], rtol=1e-3, atol=1e-3)
    tokens = valid.sum() + len(valid)
    found = compare_routing({"last_token": said}, {"prefill": whole}, {"prefill": whole}, valid, torch.float64)
    assert (found.choices, found.agreements) == (tokens, tokens)
    assert found.max_error < 1e-3


def test_a_router_of_another_number_of_tokens_is_a_fault_of_the_watching() -> None:
    routers = Routers({0: None}, np.ones((2, 4), bool), None, left=False)
    routers.start(0, 4)
    with pytest.raises(AssertionError, match="a router of 4 tokens in a pass of 8"):
        routers.route(0, torch.zeros(4, 4), torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int64), False)


def test_padding_keeps_what_the_model_chooses() -> None:
    live = np.array([[False, True]])
    for left, expected in ((False, [[3, 2], [0, 1]]), (True, [[0, 1], [3, 2]])):
        routers = Routers({0: None}, live, np.array([[[[9, 9], [0, 1]]]]), left=left)
        routers.start(0, 2)
        _, experts = routers.route(0, torch.zeros(2, 4), torch.ones(2, 2), torch.tensor([[3, 2]] * 2), False)
        assert experts.tolist() == expected


def test_nothing_is_left_behind(pair: ModelPair) -> None:
    model = pair.build(Optimizations.all())
    blocks = sparse_layers(model)
    blocks[1].route = right = blocks[1].route  # somebody else's
    with pytest.raises(KeyError), watching(model, np.ones((1, 1), bool)):
        raise KeyError
    assert "route" not in vars(blocks[0])
    assert vars(blocks[1])["route"] is right
    assert not any(block.gate._forward_hooks for block in blocks.values())


def test_compiled_steps_are_left_alone(pair: ModelPair) -> None:
    """Their model is watched uncompiled, and they choose by themselves."""
    model, calls = pair.build(Optimizations.all()), []

    def counting(right: Any) -> Any:
        def step(*given: Any) -> torch.Tensor:
            calls.append("route" in vars(model.model.layers[0].mlp))
            return right(*given)

        return step

    model.compiled_steps = {phase: counting(getattr(model, f"{phase}_step")) for phase in ("prefill", "decode")}
    trace = locate_error.trace_model(model, pair.batch("ragged"), pair.traces("ragged")[0])
    assert trace.compiled
    assert set(calls) == {False}
    assert len(calls) == 2 + STEPS  # last_token, prefill, decode
    assert set(trace.routing) == {"hidden", "last_token", "prefill", "decode"}
    assert set(model.compiled_steps) == {"prefill", "decode"}
    assert pair.compare(model, "ragged")[0].passed


def test_layer_by_layer_says_the_same(pair: ModelPair) -> None:
    layered = StreamedPair.of_shape(SHAPE, decode_steps=STEPS)
    for theirs, ours, bound in zip(pair.traces("four"), layered.traces("four"), (0, 1e-12), strict=True):
        # The prompts are the same, the forced tokens are not: in the reference an expert meets other rows with them.
        whole, parts = (trace.routing["prefill"] for trace in (theirs, ours))
        assert whole.layers == parts.layers == (0, 1)
        np.testing.assert_array_equal(whole.wanted, parts.wanted)
        np.testing.assert_allclose(whole.logits, parts.logits, rtol=0, atol=bound)
        assert ours.routing["decode"].wanted.shape == theirs.routing["decode"].wanted.shape
    model = layered.build(Optimizations.all())
    assert layered.compare(model, "ragged")[0].passed
    assert layered.locate(model, "ragged") is None
    baseline = layered.traces("ragged")[0]
    for each in (pair, layered):
        found = each._with_experts_of(baseline, model, each.batch("ragged"))
        np.testing.assert_allclose(found.decode_logits, baseline.decode_logits, rtol=1e-3, atol=1e-3)


def test_the_last_tokens_have_experts_of_their_own_pass(pair: ModelPair) -> None:
    trace = teacher_forcing.run(pair.build(EVERY["all"]), pair.batch("ragged"), hidden=False, last_token=True)
    assert trace.routing.keys() == {"last_token", "prefill"}
    for each in trace.routing.values():
        assert each.wanted[:, :, -1].min() > UNKNOWN
    assert np.array_equal(*(each.wanted[:, :, -1] for each in trace.routing.values()))


def test_losses_with_forced_experts_are_those_of_the_model_that_chose_them(pair: ModelPair) -> None:
    windows = [[5, 6, 7, 8], [9, 3]]
    stock, chosen = text.losses_and_experts(pair.baseline, windows)
    assert [each.shape for each in chosen] == [(2, 1, 4, 2), (2, 1, 2, 2)]
    np.testing.assert_array_equal(text.token_losses(pair.baseline, windows, chosen), stock)
    other = [(each + 5) % 16 for each in chosen]
    ours = pair.build(Optimizations.all())
    losses = [text.token_losses(model, windows, other) for model in (pair.baseline, ours)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert np.abs(losses[0] - stock).max() > 0.1


@pytest.mark.parametrize(("margin", "excused"), [(0.0, True), (1.0, False)], ids=["near-tie", "no tie"])
def test_a_text_may_part_after_a_near_tie_of_experts(pair: ModelPair, margin: float, excused: bool) -> None:
    baseline, reference = copy.deepcopy(pair.traces("ragged"))
    ours = forced(pair, pair.build(Optimizations.all()), baseline.chosen)
    token = int(baseline.decode_logits[1, 0].argmax())
    parted, elsewhere = (Divergence(row, 1, token, token + 1, baseline_logits=(3.0, 1.0), noise=1e-6) for row in (1, 0))
    found = text.excused_by_routing([parted], ours, baseline, reference, torch.float64)
    assert found == [parted]  # all choices are the same
    choice = ours.routing["prefill"].wanted[0, 1, 9]
    taken = next(expert for expert in range(16) if expert not in choice)
    for trace in (baseline, reference):
        logits = trace.routing["prefill"].logits[0, 1, 9]
        logits[taken] = logits[choice[-1]] - margin
    choice[-1] = taken
    found = text.excused_by_routing([parted, elsewhere], ours, baseline, reference, torch.float64)
    assert [each.excused for each in found] == [excused, False]
    words = "after a near-tie of experts: routing in prefill, layer 0 row 1 position 1"
    assert (words in found[0].describe()) is excused
    # A model that prefers another token with the baseline's experts as well is not excused by them.
    ours.decode_logits[1, 0, token] -= 100
    assert not text.excused_by_routing([parted], ours, baseline, reference, torch.float64)[0].excused
