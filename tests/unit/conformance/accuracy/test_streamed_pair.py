"""The pair whose stock models go layer by layer gives the verdicts of the whole one."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import qwen2_npu.conformance.accuracy.streamed_pair as module
from qwen2_npu import LADDER, Optimizations
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES, Batch
from qwen2_npu.conformance.accuracy.layer_by_layer import LayerAnswer
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import weights_of_checkpoint
from qwen2_npu.conformance.accuracy.routing import Choices
from qwen2_npu.conformance.accuracy.streamed_pair import StreamedPair, pair_of_checkpoint, why_streamed
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace
from qwen2_npu.conformance.machine.memory import peak_of
from qwen2_npu.errors import CheckpointError
from qwen2_npu.parallel.sharding import Shard
from tests.accuracy.faults import FAULTS, Fault
from tests.accuracy.pairs import pair_of, streamed
from tests.unit.small import small_config, small_stock

SAMPLE = ("kv_one_slot_off",)
"""Of the faults on random weights; the tiny checkpoint has another one."""
SHAPE = "qwen2-0.5b"
DECODE_STEPS = 2


@pytest.fixture(scope="module")
def whole() -> ModelPair:
    return ModelPair.of_checkpoint(decode_steps=DECODE_STEPS)


@pytest.fixture(scope="module")
def layered() -> StreamedPair:
    pair = pair_of_checkpoint(decode_steps=DECODE_STEPS, stream=True)
    assert isinstance(pair, StreamedPair)
    return pair


@pytest.fixture(scope="module")
def random_pairs() -> tuple[ModelPair, StreamedPair]:
    return ModelPair.of_shape(SHAPE, decode_steps=DECODE_STEPS), StreamedPair.of_shape(SHAPE, decode_steps=DECODE_STEPS)


@pytest.mark.parametrize("step", LADDER)
def test_every_step_passes_in_both_forms(whole: ModelPair, layered: StreamedPair, step: str) -> None:
    model = whole.build(Optimizations.up_to(step))
    for shape in BATCH_SHAPES:
        ours, theirs = (pair.compare(model, shape)[0] for pair in (layered, whole))
        assert ours.passed, ours.failures()
        assert theirs.passed, theirs.failures()
        assert ours.positions == theirs.positions
        # The prompts are the same: of them every number is.
        assert ours.paths[0] == theirs.paths[0]


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if fault.name in SAMPLE else pytest.mark.slow, id=fault.name) for fault in FAULTS],
)
def test_every_fault_fails_in_both_forms(fault: Fault, random_pairs: tuple[ModelPair, StreamedPair]) -> None:
    optimizations = Optimizations.up_to(fault.step)
    with fault.active():
        failures = [pair.failure(optimizations, fault.batch, build=fault.building(pair.build)) for pair in random_pairs]
    for failure in failures:
        assert failure.startswith(f"step {fault.step},"), failure
        assert re.search(fault.place, failure), failure


def test_a_fault_fails_on_the_tiny_checkpoint(whole: ModelPair, layered: StreamedPair) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "rotary_position")
    build = fault.building(whole.build)
    found = [pair.failure(Optimizations.up_to(fault.step), "one", build=build) for pair in (whole, layered)]
    assert all(re.search(fault.place, failure) for failure in found), found


def test_undamaged_models_have_no_finding(layered: StreamedPair) -> None:
    assert layered.locate(layered.build(Optimizations.all()), "ragged") is None


def test_the_tokens_of_decode_follow_the_text(layered: StreamedPair) -> None:
    """Neither model has a say in them. After its last token the text begins anew."""
    ids = layered.heldout_ids()
    endless = [*ids, *ids[:DECODE_STEPS]]
    for shape in BATCH_SHAPES:
        for row, tokens in zip(layered.batch(shape).rows(), layered.traces(shape)[0].forced.tolist(), strict=True):
            window = [*row.input_ids[0].tolist(), *tokens]
            assert any(endless[start : start + len(window)] == window for start in range(len(ids)))
            assert len(tokens) == DECODE_STEPS


def test_perplexity_is_the_whole_model_s(whole: ModelPair, layered: StreamedPair) -> None:
    model = whole.build(Optimizations.all())
    assert whole.perplexity(model) == layered.perplexity(model)


@pytest.mark.parametrize(
    ("dtype", "damaged"),
    [("bfloat16", False), ("float32", True), pytest.param("bfloat16", True, marks=pytest.mark.slow)],
)
def test_greedy_texts_part_where_they_do_with_the_whole_model(dtype: str, damaged: bool) -> None:
    whole, layered = (pair_of_checkpoint(dtype=dtype, stream=stream) for stream in (False, True))
    model = whole.build(Optimizations.all())
    if damaged:
        model.model.norm.weight.data += torch.linspace(0, 2, len(model.model.norm.weight)).to(model.dtype)
    expected, found = (pair.samples(model, tiny.prompts()[:3], max_new_tokens=8) for pair in (whole, layered))
    assert any(sample.divergence for sample in expected) or not damaged
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs.divergence, theirs.passed, theirs.optimised) == (ours.divergence, ours.passed, ours.optimised)
        # Beyond the place where they part the stock model's text is not known.
        assert theirs.baseline.startswith(ours.baseline) if ours.divergence else theirs.baseline == ours.baseline


def test_texts_of_several_lengths_part_at_the_first_other_token_and_not_after_their_end() -> None:
    """The stock model's text ends with the token that it would have chosen there."""
    got, preferred = [[1, 2, 3, 4], [1, 2], [1, 2]], [[1, 2, 0, 4], [1, 2, 4, 3], [1, 3, 0, 0]]
    logits = np.eye(5)[np.array(preferred)]
    last = logits[:, :1]  # after the last token, which no one asks
    told = Trace(
        logits[:, :1], np.concatenate((logits[:, 1:], last), axis=1), np.array(preferred)[:, :0], np.ones((3, 1), bool)
    )
    pair = SimpleNamespace(_forced=lambda todo, rounded: [(told, told)], scheme=None, dtype=torch.float32)
    texts, found, _ = StreamedPair.stock_texts(pair, Batch.of([[3]] * 3), got, 4)  # type: ignore[arg-type]
    assert texts == [[1, 2, 0], [1, 2], [1, 3]]
    assert [(each.row, each.position, each.baseline_token, each.optimised_token) for each in found] == [
        (0, 2, 0, 3),
        (2, 1, 3, 2),
    ]


@pytest.mark.parametrize(
    ("errors", "first", "layers"),
    [
        ([(0, 2), (1, 1), (2, 1)], (1, 1), 3),
        ([(0, 2), (2, 0)], (2, 0), 3),
        ([(1, 0), (2, 0)], (1, 0), 2),
        ([], None, 3),
    ],
    ids=str,
)
def test_the_first_pass_with_an_error_counts_and_in_it_the_first_layer(
    errors: list[tuple[int, int]], first: Any, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are outside and passes inside here; no layer is read that cannot matter."""
    read: list[int] = []
    point = SimpleNamespace

    def points(*given: Any) -> Any:
        for layer in range(3):
            read.append(layer)
            yield layer, range(3), range(3)

    def first_beyond(points: Any, stock: int, true: int, dtype: Any, step: int) -> Any:
        (found,) = points
        return (found.layer, step) if (found.layer, step) in errors else None

    monkeypatch.setattr(module.locate_error, "first_beyond", first_beyond)
    monkeypatch.setattr(module, "step_by_step", lambda *given: None)
    ours = [point(points=[point(layer=layer) for layer in range(3)]) for _ in range(3)]
    pair = point(
        batch=lambda shape: None,
        traces=lambda shape, rounded: (point(forced=None, chosen=None), None),
        rounds=lambda model: False,
        ask=lambda *given, **more: ours,
        models=point(points=points),
        dtype=torch.float32,
    )
    assert StreamedPair.locate(pair, None, "one") == first  # type: ignore[arg-type]
    assert len(read) == layers


@pytest.mark.parametrize("chosen", [None, "experts"])
@pytest.mark.parametrize("rounded", [False, True])
def test_all_models_are_looked_into_with_the_same_tokens_experts_and_activations(
    rounded: bool, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(module, "step_by_step", lambda *given: given)
    pair: Any = SimpleNamespace(
        batch=lambda shape: f"batch {shape}",
        traces=lambda shape, rounded: (SimpleNamespace(forced=f"after {shape}, {rounded}", chosen=chosen), None),
        rounds=lambda model: rounded,
        ask=lambda function, model, **given: asked.update(ours=(function, model, given)) or [],
        models=SimpleNamespace(points=lambda *given: asked.update(stock=given) or []),
    )
    assert StreamedPair.locate(pair, "ours", "four") is None
    tokens = {"batch": "batch four", "forced": f"after four, {rounded}"}
    experts = {} if chosen is None else {"chosen": chosen}
    assert asked["ours"] == (module.locate_error.captures, "ours", tokens | experts)
    assert asked["stock"] == (tuple(tokens.values()), chosen, rounded)


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_a_stock_model_whose_logits_are_not_finite_is_no_baseline(
    shape: str, random_pairs: tuple[ModelPair, StreamedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the layers before them is; at padding they are nobody's."""
    pair = StreamedPair.of_shape(SHAPE, decode_steps=DECODE_STEPS)
    right = {shape: random_pairs[1].traces(shape) for shape in BATCH_SHAPES}

    def traces(value: float, *, padding: bool) -> list[tuple[Trace, Trace]]:
        baseline, reference = right[shape]
        logits = baseline.prefill_logits.copy()
        places = np.argwhere(~baseline.valid if padding else baseline.valid)
        for row, column in places[-1:]:
            logits[row, column, 3] = value
        return list((right | {shape: (replace(baseline, prefill_logits=logits), reference)}).values())

    monkeypatch.setattr(pair, "_forced", lambda *given: traces(np.inf, padding=True))
    pair.traces(shape)
    pair._traces = {}
    monkeypatch.setattr(pair, "_forced", lambda *given: traces(np.inf, padding=False))
    with pytest.raises(CheckpointError, match=r"the stock model's own logits are not finite in torch\.float32"):
        pair.traces(shape)


def test_losses_are_of_the_text_that_was_read_and_of_the_experts_that_served_it() -> None:
    def answer(loss: float, expert: int) -> list[LayerAnswer]:
        served = Choices((0,), np.zeros((1, 1, 2, 4)), np.full((1, 1, 2, 1), expert))
        return [LayerAnswer(np.array([loss]), None, served)]  # type: ignore[arg-type]

    answers = [answer(2.0, 1), answer(3.0, 2)], [answer(2.5, 3), answer(3.5, 3)]
    windows = [[5, 6], [7, 8]]
    models = SimpleNamespace(run=lambda stock, true, rounded: answers)
    pair = SimpleNamespace(models=models, windows=lambda: windows, _losses={})
    assert StreamedPair._forced(pair, [], windows) == []  # type: ignore[arg-type]
    stock, true, experts = StreamedPair.losses(pair, windows)  # type: ignore[arg-type]
    assert (stock.tolist(), true.tolist()) == ([2.0, 3.0], [2.5, 3.5])
    assert [each.ravel().tolist() for each in experts] == [[1, 1], [2, 2]]
    with pytest.raises(AssertionError, match="other text than the held-out one"):
        StreamedPair.losses(pair, [[5, 6], [7, 9]])  # type: ignore[arg-type]


def test_weights_are_read_once_for_all_batches(layered: StreamedPair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = StreamedPair.of_shape(SHAPE, decode_steps=1)
    runs: list[int] = []
    right = pair.models.run
    monkeypatch.setattr(pair.models, "run", lambda *feeds: runs.append(1) or right(*feeds))
    for shape in BATCH_SHAPES:
        pair.traces(shape)
    assert len(runs) == 1


# ---- which form -----------------------------------------------------------------------------------------------------
def test_layer_by_layer_where_the_whole_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of_checkpoint(None, dtype="bfloat16", device="cpu", decode_steps=1)
    parameters = sum(np.prod(shape) for shape in weights.source.shapes().values())
    needed = int(parameters) * (8 + 2 + 2)
    assert why_streamed(weights, "cpu", lambda device: needed) == ""
    reason = why_streamed(weights, "cpu", lambda device: needed - 1)
    assert re.fullmatch(
        r"the stock model, its float64 self and ours need \S+ GiB of host memory, \S+ GiB are free", reason
    )
    # A card has its own memory, for the stock model and ours; the float64 self is on the host.
    for short, words in (("cpu", "float64 self"), ("cuda:0", "beside ours need .* of memory of cuda:0")):
        free = {"cpu": 8 * int(parameters), "cuda:0": 4 * int(parameters)}
        assert why_streamed(weights, "cuda:0", free.get) == ""
        free[short] -= 1
        assert re.search(words, why_streamed(weights, "cuda:0", free.get))

    monkeypatch.setattr(module, "why_streamed", lambda weights, device: reason)
    chosen = pair_of_checkpoint()
    assert isinstance(chosen, StreamedPair)
    assert chosen.reason == reason
    assert isinstance(pair_of_checkpoint(stream=False), ModelPair)


def test_of_a_shared_model_the_parts_of_this_memory_count(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of_checkpoint(None, dtype="bfloat16", device="cpu", decode_steps=1)
    config, shapes = weights.source.config, weights.source.shapes()
    parameters = int(sum(np.prod(shape) for shape in shapes.values()))
    part = int(sum(np.prod(Shard(1, 2).shape_of(name, shape, config)) for name, shape in shapes.items()))
    assert parameters / 2 <= part < 0.6 * parameters
    monkeypatch.setattr(module, "rank_count", lambda: 2)
    for here in (1, 2):  # ranks on this host
        monkeypatch.setattr(module, "ranks_of_host", lambda here=here: here)
        needed = parameters * (8 + 2) + here * part * 2
        assert why_streamed(weights, "cpu", lambda device, needed=needed: needed) == ""
        assert why_streamed(weights, "cpu", lambda device, needed=needed: needed - 1)
        # A card holds the part of one rank.
        free = {"cpu": 8 * parameters, "cuda:0": (parameters + part) * 2}
        assert why_streamed(weights, "cuda:0", free.get) == ""
        free["cuda:0"] -= 1
        assert "beside ours" in why_streamed(weights, "cuda:0", free.get)


@pytest.mark.parametrize("emulated", [True, False])
def test_an_emulated_card_has_the_memory_of_the_host(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of_checkpoint(None, dtype="bfloat16", device="cpu", decode_steps=1)
    parameters = int(sum(np.prod(shape) for shape in weights.source.shapes().values()))
    monkeypatch.setattr(module.emulator, "is_active", lambda: emulated)
    free = {"cpu": 12 * parameters - 1, "npu:0": 4 * parameters}  # 8 for float64, 2 each for the stock model and ours
    reason = why_streamed(weights, "npu:0", free.get)
    assert ("its float64 self and ours" in reason) == bool(reason) == emulated


def test_the_reference_is_what_it_is_called(random_pairs: tuple[ModelPair, StreamedPair]) -> None:
    for pair in random_pairs:
        assert pair.reference_dtype == torch.float64
        assert pair.traces("one")[1].prefill_logits.dtype == np.float64


def test_a_layer_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(MemoryError, match=r"one layer .* needs \S+ GiB of host memory, 0\.000977 GiB are free"):
        pair_of_checkpoint(stream=True)


@pytest.mark.parametrize(("stream", "kind"), [(True, StreamedPair), (False, ModelPair), (None, ModelPair)])
def test_the_suite_s_option(stream: bool | None, kind: type) -> None:
    option = SimpleNamespace(model_path=None, device="cpu", decode_steps=1, stream=stream, assume_tp=None)
    for path, weights in ((None, SHAPE), (tiny.path(), "checkpoint")):
        option.model_path = path
        config = SimpleNamespace(option=option)
        assert isinstance(pair_of(config, weights, "float32"), kind)  # type: ignore[arg-type]
        assert bool(streamed(config, "float32")) is (kind is StreamedPair)  # type: ignore[arg-type]
    option.model_path = Path("/no/such/folder")
    option.stream = None
    assert streamed(config, "float32") == "", "the header does not end the run: the tests say what is wrong"


# ---- memory ---------------------------------------------------------------------------------------------------------
MEASURED = """
import qwen2_npu, sys
from qwen2_npu.conformance.accuracy.streamed_pair import pair_of_checkpoint
if sys.argv[2] != "nothing":
    pair_of_checkpoint(sys.argv[1], device="cpu", stream=sys.argv[2] == "stream", decode_steps=2).traces("ragged")
"""


@pytest.mark.slow
def test_peak_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """24 layers of 4 million numbers, 386 MiB in float32: 772 MiB in float64, of which a layer is 32 MiB."""
    config = small_config(
        num_hidden_layers=24, hidden_size=1024, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4
    )
    small_stock(config).save_pretrained(tmp_path, safe_serialization=True)
    stored = (tmp_path / "model.safetensors").stat().st_size
    own = {}
    for form in ("nothing", "whole", "stream"):
        process = subprocess.Popen([sys.executable, "-c", MEASURED, str(tmp_path), form])
        own[form] = peak_of(process).own
        assert process.returncode == 0
    layer = stored / 24
    # The stock model in float32 is pages of its file.
    assert own["whole"] - own["nothing"] > 1.9 * stored
    # Once in float32, once in float64, and as much again for activations and what the allocator keeps.
    assert own["stream"] - own["nothing"] < 6 * layer + (64 << 20)
