"""What a pair compares with what: the same model, batch, experts and kind of activations on every side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy import channels, locate_error, pair, teacher_forcing, text
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.conformance.accuracy.locate_error import Divergence
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import Pair
from qwen2_npu.conformance.accuracy.quantised import InputRounding
from qwen2_npu.conformance.accuracy.streamed_pair import StreamedPair
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace
from qwen2_npu.errors import CheckpointError
from qwen2_npu.optimizations import Optimizations

STEPS = ("swiglu", "w8a16", "w8a8")
ROUNDING = InputRounding(lambda name: True, None)


@dataclass(kw_only=True)
class Asked(Pair):
    """Takes down what is asked of the stock side, and what the optimised model is called with."""

    asked: list[Any] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Any, device: str, decode_steps: int) -> Self:
        raise NotImplementedError

    def _said(self, *what: Any) -> Any:
        self.asked.append(what)
        return self.answers.get(what[0], what)

    def ask(self, function: Callable[..., Any], model: Any, **arguments: Any) -> Any:
        return self._said(function.__name__, model, arguments)

    @property
    def reference_dtype(self) -> torch.dtype:
        return torch.float64

    def traces(self, shape: str, rounded: bool = False) -> Any:
        return self._said("traces", shape, rounded)[1:]

    def locate(self, model: Any, shape: str) -> Any:
        return self._said("locate", model, shape)

    def layers(self, rounded: bool) -> Iterator[Any]:
        self._said("layers", rounded)
        return iter(self.answers["layer list"])

    def losses(self, windows: Sequence[Sequence[int]], rounded: bool = False) -> Any:
        return "baseline", "reference", self._said("losses", rounded)

    def stock_texts(self, batch: Any, got: Any, max_new_tokens: int, rounded: bool = False) -> Any:
        return self._said("stock_texts", rounded)


def model_of(step: str) -> Any:
    return SimpleNamespace(optimizations=Optimizations.up_to(step), device="cpu")


def pair_of(scheme: str, **answers: Any) -> Asked:
    """Of a checkpoint of that scheme; "" of one in floating point."""
    config = SimpleNamespace(vocab_size=64, eos_token_id=1)
    rounding = ROUNDING if scheme == "w8a8" else None
    tokenizer: Any = lambda content: {"input_ids": [5] * 40}  # noqa: E731
    return Asked(
        name="x", dtype=torch.bfloat16, config=config, build=lambda given: ("built", given), scheme=scheme,
        rounding=rounding, tokenizer=tokenizer, answers=answers,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["", "w8a16", "w8a8"])
def test_a_model_is_compared_with_stock_activations_of_its_own_kind(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint for w8a8 runs the ladder in floating point as well. What is known of one kind is not of the other"""
    found = pair_of(scheme)
    compared: list[Any] = []
    monkeypatch.setattr(locate_error, "trace_model", lambda model, batch, baseline, ask: ("trace", model, baseline))
    monkeypatch.setattr(pair, "compare_traces", lambda *given: compared.append(given))
    known: dict[Any, Any] = {}
    for step in (*STEPS, *STEPS):
        for shape in BATCH_SHAPES:
            model, rounded = model_of(step), scheme == step == "w8a8"
            _, trace = found.compare(model, shape)
            assert trace == ("trace", model, shape), "with the tokens of the baseline of that batch"
            assert compared[-1][:4] == (trace, shape, rounded, torch.bfloat16)
            assert compared[-1][4] is known.setdefault((shape, rounded), compared[-1][4])
            assert compared[-1][5] is bool(scheme)
    assert len({id(each) for each in known.values()}) == len(known)


@pytest.mark.parametrize("step", STEPS)
def test_channels_are_judged_layer_by_layer_of_every_model_with_8_bit_weights(step: str) -> None:
    points = [SimpleNamespace(layer=layer, name=name) for layer in (3, 4) for name in "ab"]
    given: list[Any] = []

    def layer(number: int, answer: Any) -> Any:
        return SimpleNamespace(number=number, index=0, first_wrong=lambda *of: given.append((number, *of)) or answer)

    found = pair_of("w8a8", captures=[SimpleNamespace(points=points)])
    found.answers["layer list"] = [layer(3, None), layer(4, "wrong"), layer(5, "not asked")]
    wrong = found.wrong_channel(model_of(step))
    if step == "swiglu":
        assert (wrong, found.asked) == (None, [])
        return
    assert wrong == "wrong"
    assert given == [(3, points[:2], torch.bfloat16), (4, points[2:], torch.bfloat16)]
    (_, _, how), (_, rounded) = found.asked
    assert how["batch"] is found.batch(channels.SHAPE)
    assert how["forced"].shape == (4, 0)
    assert rounded is (step == "w8a8")
    found.compare = lambda model, shape: (SimpleNamespace(passed=True), None)  # type: ignore[method-assign,assignment]
    found.wrong_channel = lambda model: "channel 7"  # type: ignore[method-assign,assignment,return-value]
    assert found.failure(Optimizations.up_to(step), "one", build=lambda given: model_of(step)) == (
        f"step {step}, channel 7"
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("chosen", [[], ["experts"]], ids=["dense", "mixture"])
def test_losses_are_those_of_the_same_activations_and_experts(
    step: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "perplexity", lambda *given: given)
    found = pair_of("w8a8", losses=chosen, token_losses="ours")
    assert found.perplexity(model_of(step)) == ("ours", "baseline", "reference", torch.bfloat16)
    (_, rounded), (_, _, how) = found.asked
    assert rounded is (step == "w8a8")
    assert how == {"windows": found.windows()} | ({"chosen": chosen} if chosen else {})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_each_text_is_judged_by_its_own_divergence(step: str, mixture: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    beyond, tie = (Divergence(row, 3, 7, 8, (1.0, 1.0 - row), 0.2) for row in (2, 0))
    forced, experts = np.ones((3, 5), np.int64), np.zeros((1, 3, 45, 2), np.int64)
    baseline: Any = SimpleNamespace(routing={"prefill": 0} if mixture else {}, forced=forced, chosen=experts)
    explained: list[Any] = []
    monkeypatch.setattr(text, "excused_by_routing", lambda found, *rest: explained.append((found, *rest)) or found)
    rows = [[2], [3], [4]]
    found = pair_of("w8a8", greedy=rows, run="ours", stock_texts=(rows, [beyond, tie], (baseline, "reference")))
    monkeypatch.setattr(type(found), "_decode_token", lambda self, token: "")
    found.tokenizer.decode = lambda row, **how: str(row)
    samples = found.samples(model_of(step), ["a", "b", "c"])
    assert [(each.prompt, each.passed, bool(each.divergence)) for each in samples] == [
        ("a", True, True), ("b", True, False), ("c", False, True)
    ]  # fmt: skip
    assert ("stock_texts", step == "w8a8") in found.asked
    assert explained == ([([beyond, tie], "ours", baseline, "reference", torch.bfloat16)] if mixture else [])
    if mixture:  # no expert can be forced in a compiled step
        how = found.asked[-1][2]
        assert how.pop("batch").lengths == [40] * 3
        assert how.pop("forced") is forced
        assert how.pop("chosen") is experts
        assert how == {"decode_steps": 5, "hidden": False, "uncompiled": True}


def test_a_channel_explains_a_failure_before_a_place_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate_error, "explain", lambda build, optimizations, *, compare, find: find)
    found = pair_of("w8a8")
    for channel in (None, "channel"):
        found.wrong_channel = lambda model, channel=channel: channel  # type: ignore[method-assign,misc]
        find: Any = found.explain(Optimizations.all(), "ragged")
        assert find("model") == (channel or ("locate", "model", "ragged"))


@pytest.mark.parametrize(
    ("own", "config", "ends", "padding"),
    [(None, 3, [3], 3), ([7, 5], 3, [7, 5], 7), (0, 3, [0], 0), (None, None, [], 0), (99, 3, [99], 0)],
)
def test_what_ends_a_text_is_said_by_the_generation_config_first(
    own: Any, config: Any, ends: list[int], padding: int
) -> None:
    found = pair_of("")
    found.tokenizer.pad_token_id = None
    found.config.eos_token_id, found.generation_config = config, SimpleNamespace(eos_token_id=own)
    assert (found.eos_token_ids, found.pad_token_id) == (ends, padding)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_at_any_token_are_refused(value: float) -> None:
    """Not at padding, where they mean nothing."""
    logits, valid = np.zeros((2, 3, 4)), np.array([[False, True, True], [True, True, True]])
    logits[0, 0, 1] = value
    found, trace = pair_of(""), Trace(logits, logits, np.zeros((2, 3), np.int64), valid)
    found.check_finite_logits(trace)
    logits[1, 0, 3] = value
    with pytest.raises(CheckpointError, match="x: the stock model's own logits are not finite"):
        found.check_finite_logits(trace)


class Rounding:
    """Takes down for which models it is active."""

    def __init__(self) -> None:
        self.active: list[Any] = []

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        self.active.append(model)
        yield
        self.active.remove(model)


def test_both_stock_models_round_activations_where_ours_does_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """And answers of one kind are not given to the other."""
    rounding: Any = Rounding()
    config = SimpleNamespace(num_hidden_layers=2)
    common: Any = {"name": "x", "dtype": torch.bfloat16, "config": config, "build": model_of, "scheme": "w8a8"}
    common |= {"rounding": rounding, "ranks": 4}
    whole = ModelPair(baseline="stock", reference="true", **common)
    layered = StreamedPair(models=SimpleNamespace(layer=lambda index: ("stock", "true")), **common)
    said: list[tuple[str, list[str], tuple[Any, ...]]] = []

    def told(name: str, *answer: Any) -> Any:
        return lambda *given, **named: said.append((name, [*rounding.active], given)) or (answer[0] if answer else name)

    chosen: list[Any] = ["experts"]
    for owner, name, *answer in (
        (teacher_forcing, "run", SimpleNamespace(forced="forced", chosen=chosen)), (teacher_forcing, "run_reference"),
        (locate_error, "locate"), (text, "losses_and_experts", ("losses", chosen)), (text, "reference_losses"),
        (text, "compare_texts", ([], None)), (ModelPair, "greedy", [[1]]), (ModelPair, "check_finite_logits"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, told(name, *answer))
    monkeypatch.setattr(text, "last_logits", lambda model: nullcontext(["logits"]))
    monkeypatch.setattr(whole, "batch", lambda shape: shape)
    for step in ("w8a16", "w8a8"):
        rounded = whole.rounds(model_of(step))
        said.clear()
        assert whole.traces("one", rounded) is whole.traces("one", rounded)
        assert whole.losses([], rounded) == ("losses", "reference_losses", chosen)
        whole.locate(model_of(step), "one")
        whole.stock_texts(["batch"], [[2]], 3, rounded)  # type: ignore[arg-type]
        assert len(said) == 8, "traces once, for both questions"
        assert {tuple(active) for _, active, _ in said} == {("stock", "true") if rounded else ()}
        given = {name: given for name, _, given in said}
        assert given["run_reference"] == ("true", "one", "forced", chosen)
        assert given["reference_losses"] == ("true", [], chosen)
        assert given["locate"][1:6] == ("stock", "true", "one", "forced", torch.bfloat16)
        assert given["locate"][-1] is chosen
        assert given["compare_texts"] == ([[2]], [[1]], ["batch"], "stock", "true", ["logits"], True)
        for each, places in ((whole, (0, 1)), (layered, (0, 0))):
            assert list(each.layers(rounded)) == [
                channels.LayerOfBoth(number, "stock", "true", place, config, rounding if rounded else None, 4)
                for number, place in enumerate(places)
            ]
    monkeypatch.setattr(StreamedPair, "_read_once", lambda self, rounded: self._losses.update({rounded: rounded}))
    monkeypatch.setattr(StreamedPair, "windows", lambda self: [])
    assert [layered.losses([], rounded) for rounded in (True, False, True)] == [True, False, True]


def test_the_longest_prompt_and_the_text_after_it_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = pair.PERPLEXITY_WINDOW + pair.SAMPLE_TOKENS
    monkeypatch.setattr(pair.tiny, "prompts", lambda: ["short", "p" * pair.PERPLEXITY_WINDOW, "short"])
    monkeypatch.setattr(pair.tiny, "heldout_text", lambda: "cut into windows" * pair.PERPLEXITY_WINDOW)
    tokenizer = lambda content: {"input_ids": [1] * len(content)}  # noqa: E731
    config = SimpleNamespace(vocab_size=2, max_position_embeddings=needed)
    pair.check_texts(config, tokenizer, 1, "here")
    config.max_position_embeddings -= 1
    with pytest.raises(CheckpointError, match=f"^here: max_position_embeddings={needed - 1}, .* need {needed}: "):
        pair.check_texts(config, tokenizer, 1, "here")
