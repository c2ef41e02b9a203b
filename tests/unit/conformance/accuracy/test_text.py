"""Perplexity and greedy texts: windows, losses, ends, and where two texts part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR
from tests.unit.conformance.accuracy.counting_model import VOCABULARY, CountingModel, answer

PROMPTS = [[5], [1, 2, 3]]
BATCH = Batch.of(PROMPTS)


class Positioned(CountingModel):
    """Counts the positions itself, as a model does that is given none."""

    def forward(self, **given):  # type: ignore[no-untyped-def]
        given.setdefault("position_ids", torch.arange(given["input_ids"].shape[1])[None])
        return super().forward(**given)


def test_a_token_s_loss_is_its_own_in_its_own_context() -> None:
    """The model gives its answer the logit 1 and all else 0."""
    right = [3, answer([3], 0)]
    windows = [[*right, (answer(right, 1) + 1) % VOCABULARY], [7, answer([7], 0)]]
    total = np.log(np.e + VOCABULARY - 1)
    model = Positioned()
    losses = text.token_losses(model, windows)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, [total - 1, total, total - 1])
    assert [call["use_cache"] for call in model.calls] == [False, False]
    assert all(call["attention_mask"].all() for call in model.calls)
    np.testing.assert_allclose(text.reference_losses(Positioned(torch.float64), windows), losses)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(6, [[0, 1, 2], [3, 4, 5]]), (7, [[0, 1, 2], [3, 4, 5]]), (8, [[0, 1, 2], [3, 4, 5], [6, 7]]), (0, [])],
)
def test_windows_follow_one_another_and_have_two_tokens_at_least(limit: int, expected: list[list[int]]) -> None:
    assert text.text_windows(range(100), length=3, limit=limit) == expected


def test_perplexity_is_of_the_mean_loss_and_passes_by_its_error() -> None:
    reference = np.array([1.0, 2.0, 4.5])
    error = 2.0**-10
    for factor, passed in ((RMS_FACTOR, True), (RMS_FACTOR + 1e-9, False)):
        found = text.perplexity(reference - factor * error, reference + error, reference, torch.float32)
        assert found.tokens == 3
        assert found.baseline == pytest.approx(np.exp(2.5 + error), rel=1e-12)
        assert found.optimised == pytest.approx(np.exp(2.5 - factor * error), rel=1e-12)
        assert found.passed is passed


def continued(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(answer(tokens, len(tokens) - 1))
    return tokens[len(prompt) :]


def test_greedy_text_ends_with_the_first_end_of_its_row() -> None:
    rows = [continued(prompt, 4) for prompt in PROMPTS]
    ends = [rows[0][1], 63]
    model = CountingModel()
    found = text.greedy(model, BATCH, max_new_tokens=4, eos_token_ids=ends, pad_token_id=9)
    assert found == [rows[0][:2], rows[1]]
    asked = {key: model.generated[key] for key in model.generated if key not in ("input_ids", "attention_mask")}
    assert asked == {
        "max_new_tokens": 4, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": ends,
        "pad_token_id": 9,
    }  # fmt: skip
    assert torch.equal(model.generated["attention_mask"], BATCH.attention_mask)
    text.greedy(model, BATCH, max_new_tokens=1, eos_token_ids=[], pad_token_id=9)
    assert model.generated["eos_token_id"] is None


HALF_STEP = 2.0**-24
"""Of float32 at 1.0, the largest logit: these models make no error."""


def test_texts_that_part_are_explained_row_by_row() -> None:
    rows = [continued(prompt, 3) for prompt in PROMPTS]
    models = CountingModel(), CountingModel(torch.float64)
    assert text.compare_texts(rows, rows, BATCH, *models)[0] == []
    assert not models[0].calls
    other = (rows[1][2] + 1) % VOCABULARY
    (found,) = text.compare_texts([rows[0], [*rows[1][:2], other]], rows, BATCH, *models)[0]
    assert (found.row, found.position, found.baseline_token, found.optimised_token) == (1, 2, rows[1][2], other)
    assert (found.baseline_logits, found.noise, found.excused) == ((1.0, 0.0), HALF_STEP, False)


def test_a_text_that_ends_earlier_parts_where_it_ends() -> None:
    rows = [continued(prompt, 3) for prompt in PROMPTS]
    models = CountingModel(), CountingModel(torch.float64)
    (found,) = text.compare_texts([rows[0][:2], rows[1]], rows, BATCH, *models)[0]
    assert (found.row, found.position) == (0, 2)
    assert text.compare_texts([rows[0][:2], rows[1]], [rows[0][:2], rows[1]], BATCH, *models)[0] == []
    # Of a shorter row what follows its end is filler, and no divergence.
    (found,) = text.compare_texts([rows[0][:1], [*rows[1][:2], 63]], [rows[0][:1], rows[1]], BATCH, *models)[0]
    assert found.row == 1


def test_the_longer_of_two_texts_is_followed_to_its_end() -> None:
    rows = [continued(prompt, 3) for prompt in PROMPTS]
    models = CountingModel(), CountingModel(torch.float64)
    shorter = [[rows[0][0]], [rows[1][0]]]
    for ours, theirs in ((shorter, rows), (rows, shorter)):
        found = text.compare_texts(ours, theirs, BATCH, *models)[0]
        assert [(each.row, each.position) for each in found] == [(0, 1), (1, 1)]
    assert not any(call.get("output_hidden_states") for call in models[0].calls), "not needed, and as long as a prefill"


@pytest.mark.parametrize(("piece", "sizes"), [(1, [1] * 5), (2 * VOCABULARY, [2, 2, 1]), (1 << 19, [5])])
def test_losses_of_pieces_are_those_of_the_whole(piece: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(size=(5, VOCABULARY)).astype(np.float32) * 9
    window = [63, 5, 0, 17, 2, 40]
    looked_at: list[int] = []
    normalisers = text.normalisers

    def watched(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        looked_at.append(len(given))
        return normalisers(given)

    monkeypatch.setattr(text, "PIECE", piece)
    monkeypatch.setattr(text, "normalisers", watched)
    exact = logits.astype(np.float64)
    expected = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(5), window[1:]]
    np.testing.assert_allclose(text.losses_of(logits, window), expected, rtol=1e-12)
    assert looked_at == sizes


def test_the_last_logits_of_every_pass_are_kept_and_none_afterwards() -> None:
    model = Positioned()
    passes = [torch.tensor([[5, 6]]), torch.tensor([[1, 2, 3]])]
    with text.last_logits(model) as found:
        said = [
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1] for ids in passes
        ]
    model(input_ids=passes[0], attention_mask=torch.ones_like(passes[0]), use_cache=False)
    assert [each.tolist() for each in found] == [each.tolist() for each in said]


@pytest.mark.parametrize("place", [0, 2])
def test_no_more_is_asked_for_than_where_texts_part(place: int) -> None:
    """Of both models: the rows that part, and the passes up to there."""
    rows = [continued(prompt, 3) for prompt in PROMPTS]
    other = list(rows[1])
    other[place] = (other[place] + 1) % VOCABULARY
    models = CountingModel(), CountingModel(torch.float64)
    text.compare_texts([rows[0], other], rows, BATCH, *models)
    width = BATCH.input_ids.shape[1]
    assert [tuple(call["input_ids"].shape) for call in models[0].calls] == [(2, width), *[(2, 1)] * place]
    assert [tuple(call["input_ids"].shape) for call in models[1].calls] == [(1, width + place)]


@pytest.mark.parametrize("pooled", [False, True])
def test_pooled_noise_is_of_all_rows_and_steps(pooled: bool) -> None:
    """Otherwise it is that of the place alone. What the baseline said is given, and not asked for again."""
    rows = [continued(prompt, 3) for prompt in PROMPTS]
    off = np.array([[0.5, 0.25, 1.0], [0.125, 0.75, 0.5]])
    said = np.zeros((3, 2, VOCABULARY))
    for row, step in np.ndindex(off.shape):
        said[step, row, rows[row][step]] = 1.0 + off[row, step]
    other = [rows[0], [(rows[1][0] + 1) % VOCABULARY, *rows[1][1:]]]
    models = CountingModel(), CountingModel(torch.float64)
    (found,) = text.compare_texts(other, rows, BATCH, *models, list(said), pooled)[0]
    assert (found.row, found.position) == (1, 0)
    assert found.noise == pytest.approx(np.sqrt(np.mean(off**2)) if pooled else off[1, 0])
    assert not models[0].calls
    width = BATCH.input_ids.shape[1]
    assert [tuple(call["input_ids"].shape) for call in models[1].calls] == [(2, width + 2) if pooled else (1, width)]


def test_of_a_mixture_the_traces_of_both_models_come_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of nothing else: where nothing parts, and of dense models, there are none."""
    rows = [continued(prompt, 3) for prompt in PROMPTS]
    other = [rows[0], [rows[1][0], (rows[1][1] + 1) % VOCABULARY, rows[1][2]]]
    models = CountingModel(), CountingModel(torch.float64)
    assert text.compare_texts(rows, rows, BATCH, *models) == ([], None)
    dense, traces = text.compare_texts(other, rows, BATCH, *models)
    assert traces is None
    monkeypatch.setattr(text, "expert_count", lambda config: 2)
    assert text.compare_texts(rows, rows, BATCH, *models) == ([], None)
    found, traces = text.compare_texts(other, rows, BATCH, *models)
    assert found == dense
    assert traces is not None
    assert [trace.decode_logits.dtype for trace in traces] == [np.float32, np.float64]
    assert all(trace.forced.tolist() == rows for trace in traces)
    assert not any(call.get("output_hidden_states") for call in models[0].calls)
