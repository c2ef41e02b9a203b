"""Localisation with faults put into weights, so that the place is known exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu import Optimizations
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.conformance.accuracy import locate_error, teacher_forcing
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.intermediates import PassRecorder, Point, capturing
from qwen2_npu.conformance.accuracy.locate_error import Divergence, ErrorLocation
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, ErrorRatio
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace
from qwen2_npu.models import attention
from qwen2_npu.optimizations import REQUIRES
from tests.unit.conformance.accuracy.counting_model import CountingModel

DECODE_STEPS = 2


# ---- each rule alone, on passes written by hand ---------------------------------------------------------------------
NOISE = 2.0**-10
PLACES: tuple[tuple[int | None, str], ...] = ((0, "q_proj"), (0, "key"), (1, "key"), (None, "lm_head"))


def recorded(error: float = 0.0, heads: int = 2, **changes: Any) -> PassRecorder:
    """A pass of one row of three tokens, each value off by ``error``."""
    found = PassRecorder(new=[3], total=[3], left=True)
    for number, (layer, name) in enumerate(PLACES):
        values = np.arange(12.0).reshape(3, 4) + 100 * number + error
        found.points.append(Point(layer, name, values, ("npu_x",) if name == "key" else (), heads))
    return found


def first(ours: PassRecorder, step: int = 0) -> ErrorLocation | None:
    return locate_error.first_beyond(ours.points, recorded(NOISE), recorded(), torch.float32, step)


@pytest.mark.parametrize("at", range(len(PLACES)))
def test_each_point_is_judged_up_to_its_limit(at: int) -> None:
    """Twelve values: the one that is off may carry what the others leave of 1.5 times the noise."""
    for beyond, found in ((1 - 1e-9, False), (1 + 1e-9, True)):
        ours = recorded(NOISE)
        ours.points[at].values[2, 3] += beyond * NOISE * (np.sqrt(RMS_FACTOR**2 * 12 - 11)) - NOISE
        location = first(ours)
        assert (location is not None) is found
        if location is not None:
            assert (location.layer, location.name, location.path) == (*PLACES[at], "prefill")
            assert location.operators == ours.points[at].operators


def test_the_first_point_in_order_of_execution_is_named() -> None:
    ours = recorded(NOISE)
    for at in (3, 1, 2):
        ours.points[at].values[...] += 1
    location = first(ours, step=3)
    assert location is not None
    assert (location.layer, location.name, location.path) == (0, "key", "decode step 2")
    assert str(location).startswith("layer 0, key (npu_x): RMS error 1 exceeds 1.5 × noise 0.000977, in decode step 2")


@pytest.mark.parametrize("missing", ["stock", "true"])
def test_points_that_another_model_lacks_are_passed_over(missing: str) -> None:
    ours, stock, true = recorded(NOISE), recorded(NOISE), recorded()
    for at in (1, 2):
        ours.points[at].values[...] += 1
    del {"stock": stock, "true": true}[missing].points[1]
    location = locate_error.first_beyond(ours.points, stock, true, torch.float32, 0)
    assert location is not None
    assert location.layer == 1


def test_another_shape_is_beyond_every_bound() -> None:
    ours = recorded(NOISE)
    ours.points[1] = replace(ours.points[1], values=ours.points[1].values[:, :2])
    location = first(ours)
    assert location is not None
    assert (location.error.optimised, location.error.baseline, location.error.floor) == (float("inf"), 0.0, 0.0)
    assert not location.heads_moved


@pytest.mark.parametrize(
    ("order", "heads", "moved"), [([1, 0], 2, True), ([0, 0], 2, True), ([1, 0], 1, False), ([0, 2], 2, False)]
)
def test_heads_that_are_right_and_in_the_wrong_place_are_called_that(order: list[int], heads: int, moved: bool) -> None:
    """kv heads mapped modulo the number of query heads, say: the rotary embedding has nothing to do with it."""
    ours, stock, true = recorded(NOISE, heads), recorded(NOISE, heads), recorded(heads=heads)
    parts = [*np.split(ours.points[1].values, 2, axis=1), np.full((3, 2), 7.0)]
    ours.points[1] = replace(ours.points[1], values=np.concatenate([parts[at] for at in order], axis=1))
    location = locate_error.first_beyond(ours.points, stock, true, torch.float32, 0)
    assert location is not None
    assert location.heads_moved is moved
    assert ("(heads in the wrong places: the mapping of query heads to kv heads" in str(location)) is moved
    assert ("(npu_x)" in str(location)) is not moved


OPERATORS = {
    "q_proj": "linear", "k_proj": "linear", "v_proj": "linear", "query": "rotary embedding",
    "key": "rotary embedding, cache", "value": "cache", "attention": "matmul, softmax, matmul", "o_proj": "linear",
    "gate_proj": "linear", "up_proj": "linear", "mlp activation": "silu, mul", "down_proj": "linear",
    "lm_head": "linear", "residual into norm": "add, norm", "input_layernorm": "add, norm",
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_small_operators_are_named_by_their_point(name: str) -> None:
    error = ErrorRatio(2.0, 1.0, 0.0)
    said = str(ErrorLocation("prefill", 1, name, (), error))
    assert said == f"layer 1, {name} ({OPERATORS[name]}): RMS error 2 exceeds 1.5 × noise 1, in prefill"
    assert str(ErrorLocation("prefill", None, name, ("npu_a", "npu_b"), error)).startswith(f"{name} (npu_a, npu_b): ")


@pytest.mark.parametrize(
    ("shape", "ours", "true", "moved"),
    [
        ((3, 4), 2, 2, True),
        ((3, 4), 1, 1, False),  # one head has no other place
        ((3, 4), 2, 4, False),
        ((3, 4), 4, 2, False),
        ((3, 2), 2, 2, False),
        ((3, 6), 2, 2, False),
    ],
)
def test_heads_can_only_be_moved_between_places_of_their_size(
    shape: tuple[int, int], ours: int, true: int, moved: bool
) -> None:
    values = np.arange(3 * shape[1]).reshape(shape) % shape[1] // 2.0
    mine = Point(0, "key", 1 - values, (), ours)
    stock, exact = (Point(0, "key", np.arange(12).reshape(3, 4) % 4 // 2.0, (), true) for _ in range(2))
    assert locate_error._heads_moved(mine, stock, exact, torch.float32) is moved


@pytest.mark.parametrize(
    ("order", "moved"),
    [
        ((0, 1, 2), False),
        ((1, 0, 2), True),
        ((0, 0, 2), True),
        ((0, 1, 1), True),
        ((0, 1, 3), False),
        ((1, 0, 3), False),
    ],
)
def test_heads_have_moved_if_all_are_known_and_one_is_not_at_home(order: tuple[int, ...], moved: bool) -> None:
    """Head 3 is none of the reference's."""
    heads = [np.full((2, 2), float(10 * number)) for number in range(4)]
    true = Point(0, "key", np.concatenate(heads[:3], axis=1), (), 3)
    mine = Point(0, "key", np.concatenate([heads[at] for at in order], axis=1), (), 3)
    assert locate_error._heads_moved(mine, true, true, torch.float32) is moved


@pytest.mark.parametrize("width", [2, 6])
def test_more_and_fewer_features_are_another_shape(width: int) -> None:
    mine, true = Point(0, "key", np.ones((3, width))), Point(0, "key", np.ones((3, 4)))
    assert locate_error._error(mine, true, true, torch.float32).optimised == float("inf")


@pytest.mark.parametrize("at", range(3))
def test_every_pass_is_looked_at(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = {
        name: [recorded(error) for _ in range(3)] for name, error in (("ours", NOISE), ("stock", NOISE), ("true", 0))
    }
    passes["ours"][at].points[3].values[...] += 1
    monkeypatch.setattr(locate_error, "captures", lambda model, batch, forced, chosen=None: passes[model.name])
    ours, stock, true = (SimpleNamespace(name=name, dtype=torch.float32) for name in passes)
    asked = []

    def ask(function: Any, model: Any, **given: Any) -> Any:
        asked.append((model, sorted(given)))
        return function(model, **given)

    batch = Batch.of([[1]])
    found = locate_error.locate(ours, stock, true, batch, np.zeros((1, 2), np.int64), torch.float32, ask)
    assert found is not None
    assert (found.name, found.path) == ("lm_head", ("prefill", "decode step 0", "decode step 1")[at])
    assert asked == [(ours, ["batch", "forced"])], "the ranks that share it are asked, and they alone"


def test_what_a_switch_needs_stands_before_it() -> None:
    """The steps are tried by switching on one more each time: none is refused on the way."""
    order = [field.name for field in fields(Optimizations)]
    for name, needed in REQUIRES.items():
        assert all(order.index(each) < order.index(name) for each in needed), name


class Broken:
    """A ladder in which everything from one step on fails."""

    def __init__(self, since: str) -> None:
        self.since = since
        self.built: list[tuple[str, ...]] = []

    def build(self, optimizations: Optimizations) -> tuple[str, ...]:
        self.built.append(optimizations.names())
        return optimizations.names()

    def compare(self, names: tuple[str, ...]) -> Any:
        fails = not self.since or self.since in names
        return SimpleNamespace(passed=not fails, failures=lambda: [f"decode: {len(names)} steps", "more"])

    def explain(self) -> locate_error.Explanation | None:
        return locate_error.explain(self.build, Optimizations.all(), compare=self.compare, find=lambda model: None)


@pytest.mark.parametrize("since", Optimizations.all().names())
def test_the_failing_step_is_found_by_bisection(since: str) -> None:
    ladder = Broken(since)
    found = ladder.explain()
    names = Optimizations.all().names()
    assert found is not None
    assert found.step == since
    assert found.optimizations == names[: names.index(since) + 1] == ladder.built[-1]
    assert found.failures == (f"decode: {names.index(since) + 1} steps", "more")
    assert ladder.built[:2] == [names, ()]
    *tried, explained = ladder.built
    assert len(set(tried)) == len(tried) <= 2 + math.ceil(math.log2(len(names)))
    assert {explained, explained[:-1]} <= set(tried), "it fails with the step, and not without"
    assert str(found) == (
        f"step {since}, no intermediate tensor exceeds its bound when run eagerly: suspect the compiled graph; "
        f"decode: {names.index(since) + 1} steps"
    )


def test_a_ladder_that_fails_at_once_or_not_at_all() -> None:
    ladder = Broken("")
    found = ladder.explain()
    assert found is not None
    assert (found.step, found.optimizations) == (None, ())
    assert ladder.built == [Optimizations.all().names(), (), ()]
    ladder = Broken("no such step")
    assert ladder.explain() is None
    assert ladder.built == [Optimizations.all().names()]


def test_without_any_step_there_is_nothing_to_bisect() -> None:
    built = []
    found = locate_error.explain(
        lambda tried: built.append(tried.names()),
        Optimizations.none(),
        compare=lambda model: SimpleNamespace(passed=False, failures=lambda: ["decode: a"]),
        find=lambda model: None,
    )
    assert found is not None
    assert (found.step, found.failures, built) == (None, ("decode: a",), [(), ()])


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        (("last_token: a", "last_token: b"), "but those kept with logits_to_keep=1 are not the last token's"),
        (("last_token: a", "routing in last_token, b"), "but those kept with logits_to_keep=1 are not the last"),
        (("last_token: a", "routing in decode, b"), "suspect the compiled graph"),
        (("routing in last_token, a", "routing in last_token, b"), "but the router chooses others"),
        (("last_token: a", "decode: b"), "suspect the compiled graph"),
        (("decode: a", "last_token: b"), "suspect the compiled graph"),
    ],
)
def test_what_is_wrong_where_no_tensor_is(failures: tuple[str, ...], text: str) -> None:
    found = locate_error.Explanation("swiglu", ("swiglu",), None, failures)
    assert text in str(found)
    assert str(found).endswith(f"; {failures[0]}")
    written = found.to_dict()
    assert written == {
        "message": str(found), "step": "swiglu", "optimizations": ("swiglu",), "finding": None, "failures": failures,
    }  # fmt: skip


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("step", range(3))
def test_each_row_parts_at_its_first_other_token_and_is_excused_up_to_twice_the_noise(row: int, step: int) -> None:
    rows, steps, width, vocabulary = 3, 3, 2, 6
    for beyond, excused in ((0.0, True), (2.0**-40, False)):
        logits = [np.zeros((rows, count, vocabulary)) for count in (width, steps)]
        forced = np.zeros((rows, steps), np.int64)
        margin = 2 * NOISE + beyond
        for values in logits:
            values[..., 0], values[..., 3] = 1.0, 1.0 - margin
        reference = Trace(logits[0], logits[1], forced, np.ones((rows, width), bool))
        baseline = replace(reference, prefill_logits=logits[0].copy(), decode_logits=logits[1].copy())
        known = baseline.prefill_logits[row, -1] if step == 0 else baseline.decode_logits[row, step - 1]
        known[5] += NOISE
        chosen = forced.copy()
        chosen[row, step] = 3
        chosen[row, step + 1 :] = 4  # what follows has another context
        (found,) = locate_error.divergences(chosen, baseline, reference, torch.float64)
        assert (found.row, found.position, found.baseline_token, found.optimised_token) == (row, step, 0, 3)
        assert (found.margin, found.noise, found.excused) == (margin, NOISE, excused)
        assert (" is a near-tie, within 2 × noise" in found.describe()) is excused
    lower = replace(baseline, forced=forced + 3), replace(reference, forced=forced + 3)
    (found,) = locate_error.divergences(np.where(chosen == 0, 3, 0), *lower, torch.float64)
    assert (found.row, found.position, found.baseline_token, found.optimised_token) == (row, step, 3, 0)
    everywhere = np.full_like(forced, 3)
    assert [each.row for each in locate_error.divergences(everywhere, baseline, reference, torch.float64)] == [0, 1, 2]


@pytest.mark.parametrize("step", [0, 1])
def test_a_text_may_part_between_neighbours_of_the_dtype(step: int) -> None:
    """However exact the baseline is: a right model may round the one to the other. Seen in bfloat16 at 8.3125."""
    for margin, excused in ((2.0**-4, True), (2.0**-4 + 2.0**-40, False)):
        logits = [np.zeros((1, count, 4)) for count in (2, 2)]
        for values in logits:
            values[..., 0], values[..., 3] = 8.3125, 8.3125 - margin
        exact = Trace(logits[0], logits[1], np.zeros((1, 2), np.int64), np.ones((1, 2), bool))
        chosen = np.array([[3, 0], [0, 3]])[[step]]
        (found,) = locate_error.divergences(chosen, exact, exact, torch.bfloat16)
        assert (found.margin, found.noise, found.excused) == (margin, 2.0**-5, excused)


@pytest.mark.parametrize("step", [0, 1])
def test_a_text_that_parts_where_the_baseline_was_lucky(step: int) -> None:
    """Of 8-bit weights the noise there is at least the RMS of all positions of the texts."""
    rows, steps, width, vocabulary = 2, 3, 2, 6
    logits = [np.zeros((rows, count, vocabulary)) for count in (width, steps)]
    usual = NOISE * np.sqrt(1 - 1 / (rows * (steps + 1)))
    for values in logits:
        values[..., 0], values[..., 3] = 1.0, 1.0 - 2 * usual + 2.0**-40
    forced = np.zeros((rows, steps), np.int64)
    reference = Trace(logits[0], logits[1], forced, np.ones((rows, width), bool))
    baseline = replace(reference, prefill_logits=logits[0] + NOISE, decode_logits=logits[1] + NOISE)
    lucky = (baseline.prefill_logits, 0, -1) if step == 0 else (baseline.decode_logits, 0, step - 1)
    lucky[0][lucky[1:]] -= NOISE
    chosen = forced.copy()
    chosen[0, step] = 3
    assert locate_error.divergences(chosen, baseline, reference, torch.float64)[0].noise == 2.0**-53
    for pooled, noise in ((False, 2.0**-53), (True, usual)):
        (found,) = locate_error.divergences(chosen, baseline, reference, torch.float64, pooled)
        assert found.noise == pytest.approx(noise)
        assert found.excused is pooled


def test_the_optimised_model_is_traced_on_the_baseline_s_paths() -> None:
    """Forced to its tokens, with hidden states where it has them, and the last token's logits where a switch asks."""
    batch = Batch.of([[5], [1, 2, 3]])
    baseline = teacher_forcing.run(CountingModel(), batch, decode_steps=2)
    for hidden, last in ((True, True), (False, False)):
        model = CountingModel()
        model.optimizations = SimpleNamespace(last_token_logits=last, fixed_kv_cache=False)  # type: ignore[assignment]
        given = baseline if hidden else replace(baseline, hidden=None)
        trace = locate_error.trace_model(model, batch, given)
        assert np.array_equal(trace.forced, baseline.forced)
        assert np.array_equal(trace.decode_logits, baseline.decode_logits)
        assert ((trace.hidden is not None), (trace.last_logits is not None)) == (hidden, last)


# ---- whole models ----------------------------------------------------------------------------------------------------
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
    assert locate_error.divergences(chosen, baseline, reference, torch.float64) == []
    chosen[2, 1] = (chosen[2, 1] + 1) % 512
    (found,) = locate_error.divergences(chosen, baseline, reference, torch.float64)
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


MAPPINGS = {
    "modulo": lambda states, groups: states.repeat(1, groups, 1, 1),  # head h reads h % K in place of h // (N / K)
    "reversed": lambda states, groups: states.flip(1).repeat_interleave(groups, 1),
}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("step", ["", "fixed_kv_cache"])
def test_a_wrong_mapping_of_kv_heads_is_not_called_a_rotary_embedding(
    step: str, mapping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small operators repeat kv heads themselves. Where the first head of each group is right by luck, attention is
    the first that is wrong."""
    grouped = ModelPair.of_shape("qwen2-1.5b", decode_steps=1)
    monkeypatch.setattr(attention, "_repeat_heads", MAPPINGS[mapping])
    message = grouped.failure(Optimizations.up_to(step) if step else Optimizations.none(), "one")
    heads = "layer 0, key (heads in the wrong places: the mapping of query heads to kv heads" in message
    assert heads or (mapping == "modulo" and "layer 0, attention (matmul, softmax, matmul)" in message), message
    assert "rotary" not in message


def test_a_compiled_model_is_looked_into_without_its_graphs(pair: ModelPair) -> None:
    """Hooks see eager execution only: what a graph computes would pass unseen."""

    def unseen(*_: Any) -> Any:
        raise AssertionError("a compiled step was called")

    baseline, _ = pair.traces("one")
    model = pair.build(Optimizations.all())
    model.compiled_steps = {"prefill": unseen, "decode": unseen}
    found = locate_error.captures(model, pair.batch("one"), baseline.forced)
    assert len(found) == 1 + baseline.forced.shape[1]
    assert all(len(capture.points) == len(found[0].points) > 10 for capture in found)


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_a_shared_model_every_point_of_every_pass_is_put_together(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def two_points(model: Any, *, new: list[int], total: list[int]) -> Iterator[PassRecorder]:
        yield PassRecorder(new, total, True, [Point(0, "key", np.zeros((1, 1))), Point(1, "key", np.zeros((1, 1)))])

    monkeypatch.setattr(locate_error, "capturing", two_points)
    monkeypatch.setattr(locate_error, "of_all_ranks", lambda point, model: replace(point, heads=7))
    model = CountingModel()
    model.ranks = SimpleNamespace(size=ranks)  # type: ignore[assignment]
    model.optimizations = SimpleNamespace(fixed_kv_cache=True)  # type: ignore[assignment]
    batch = Batch.of([[5], [1, 2, 3]])
    found = locate_error.captures(model, batch, np.array([[10, 11], [20, 21]]))
    assert [[point.heads for point in capture.points] for capture in found] == [[7 if ranks > 1 else 1] * 2] * 3
    assert [(capture.new, capture.total) for capture in found] == [
        ([1, 3], [1, 3]), ([1, 1], [2, 4]), ([1, 1], [3, 5]),
    ]  # fmt: skip
    assert [call["position_ids"].tolist() for call in model.calls] == [
        [[1, 1, 0], [0, 1, 2]], [[1], [3]], [[2], [4]],
    ]  # fmt: skip
    assert [call["input_ids"].tolist() for call in model.calls[1:]] == [[[10], [20]], [[11], [21]]]
    assert [call["attention_mask"].shape[1] for call in model.calls] == [3, 4, 5]
    assert all(call["use_cache"] for call in model.calls)
    assert model.allocated == (2, 3 + 2)
    assert [len(row) for row in model.calls[2][CACHE_NAME]] == [2, 4]
