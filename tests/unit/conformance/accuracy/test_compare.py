from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy import compare
from qwen2_npu.conformance.accuracy.compare import KnownPath, compare_traces, kl_divergence
from qwen2_npu.conformance.accuracy.teacher_forcing import Array, Trace

ROWS, WIDTH, STEPS, VOCABULARY = 2, 3, 2, 5
VALID = np.array([[False, True, True], [True, True, True]])


def logits(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal((*shape, VOCABULARY))


def trace(prefill: Array, decode: Array) -> Trace:
    return Trace(prefill, decode, np.zeros((ROWS, STEPS), np.int64), VALID)


def off_by(reference: Trace, error: float, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    parts = [
        part + error * rng.standard_normal(part.shape) for part in (reference.prefill_logits, reference.decode_logits)
    ]
    return replace(reference, prefill_logits=parts[0], decode_logits=parts[1])


@pytest.fixture
def reference() -> Trace:
    return trace(logits(ROWS, WIDTH), logits(ROWS, STEPS))


def test_same_noise_passes_and_every_valid_position_is_counted(reference: Trace) -> None:
    result = compare_traces(off_by(reference, 1e-5, 1), off_by(reference, 1e-5, 2), reference, torch.float32)
    assert result.passed
    assert result.positions == VALID.sum() + ROWS * STEPS
    assert result.agreement == 1.0
    assert result.failures() == []
    assert 0 < result.kl_mean < 1e-8


def test_padding_is_never_compared(reference: Trace) -> None:
    optimised = off_by(reference, 1e-5, 1)
    optimised.prefill_logits[~VALID] = np.nan
    assert compare_traces(optimised, off_by(reference, 1e-5, 2), reference, torch.float32).passed


def test_too_much_error_on_one_path_fails_and_is_named(reference: Trace) -> None:
    optimised = off_by(reference, 1e-5, 1)
    optimised = replace(optimised, decode_logits=off_by(reference, 1e-4, 1).decode_logits)
    result = compare_traces(optimised, off_by(reference, 1e-5, 2), reference, torch.float32)
    assert not result.passed
    assert [line.split(":")[0] for line in result.failures()] == ["decode"]


@pytest.mark.parametrize(("margin", "excused"), [(1.5e-3, True), (0.5, False)])
def test_mismatch_is_excused_only_within_the_noise_measured_at_its_position(margin: float, excused: bool) -> None:
    reference = trace(np.zeros((ROWS, WIDTH, VOCABULARY)), np.zeros((ROWS, STEPS, VOCABULARY)))
    for part in (reference.prefill_logits, reference.decode_logits):
        part[..., 0], part[..., 1] = margin, 0.0
    baseline = replace(reference, prefill_logits=reference.prefill_logits + 1e-3)  # noise 1e-3 everywhere
    optimised = replace(baseline, prefill_logits=baseline.prefill_logits.copy())
    optimised.prefill_logits[1, 2, [0, 1]] = 0.0, margin
    result = compare_traces(optimised, baseline, reference, torch.float32)
    (mismatch,) = result.excused if excused else result.unexcused
    assert (mismatch.row, mismatch.position) == (1, 2)
    assert (mismatch.baseline_token, mismatch.optimised_token) == (0, 1)
    assert mismatch.margin == pytest.approx(margin)
    assert mismatch.noise == pytest.approx(1e-3)
    assert len(result.excused) + len(result.unexcused) == 1
    assert any("baseline prefers token 0, optimised 1" in line for line in result.failures()) is not excused


def test_a_choice_far_below_the_best_is_not_excused_by_a_close_runner_up() -> None:
    reference = trace(np.zeros((ROWS, WIDTH, VOCABULARY)), np.zeros((ROWS, STEPS, VOCABULARY)))
    for part in (reference.prefill_logits, reference.decode_logits):
        part[...] = [1.0, 1.0 - 1e-6, -1.0, -1.0, -1.0]
    baseline = replace(reference, prefill_logits=reference.prefill_logits + 1e-3)
    optimised = replace(baseline, prefill_logits=baseline.prefill_logits.copy())
    optimised.prefill_logits[0, 1, 2] = 5.0
    assert len(compare_traces(optimised, baseline, reference, torch.float32).unexcused) == 1


def test_positions_count_the_tokens_of_the_row_not_the_columns(reference: Trace) -> None:
    baseline = off_by(reference, 1e-6, 2)
    optimised = replace(baseline, prefill_logits=-baseline.prefill_logits)
    mismatches = compare_traces(optimised, baseline, reference, torch.float32).paths[0].mismatches
    assert {(mismatch.row, mismatch.position) for mismatch in mismatches} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}


def test_nan_of_the_optimised_model_fails(reference: Trace) -> None:
    optimised = off_by(reference, 1e-5, 1)
    optimised.decode_logits[0, 0, 0] = np.nan
    assert not compare_traces(optimised, off_by(reference, 1e-5, 2), reference, torch.float32).passed


def test_nan_of_the_baseline_is_an_error(reference: Trace) -> None:
    baseline = off_by(reference, 1e-5, 2)
    baseline.decode_logits[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="baseline's decode logits are not finite"):
        compare_traces(off_by(reference, 1e-5, 1), baseline, reference, torch.float32)


def test_traces_of_different_tokens_are_refused(reference: Trace) -> None:
    other = replace(reference, forced=reference.forced + 1)
    with pytest.raises(ValueError, match="different tokens"):
        compare_traces(other, reference, reference, torch.float32)


def test_kl_divergence_matches_its_definition() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = (p * np.log(p / q)).sum()
    np.testing.assert_allclose(kl_divergence(np.log(p)[None] + 3, np.log(q)[None] - 50), [expected])
    assert kl_divergence(np.log(p)[None], np.log(p)[None])[0] == 0


def test_what_is_known_of_the_baseline_changes_no_bit(reference: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that it was computed for another model, nor in how many pieces."""
    baseline = off_by(reference, 1e-2, 2)
    models = [
        replace(off_by(reference, 1e-2, seed), hidden=None, last_logits=reference.prefill_logits[:, -1] + seed)
        for seed in (3, 4)
    ]
    alone = [compare_traces(model, baseline, reference, torch.float32) for model in models]
    known: dict[str, KnownPath] = {}
    for piece in (1, compare.PIECE):
        monkeypatch.setattr(compare, "PIECE", piece)
        assert [compare_traces(model, baseline, reference, torch.float32, known) for model in models] == alone
    assert set(known) == {"prefill", "last_token", "decode"}


def test_the_baseline_is_looked_at_once(reference: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    right = compare._known_path
    monkeypatch.setattr(compare, "_known_path", lambda path, *rest: calls.append(path) or right(path, *rest))
    known: dict[str, KnownPath] = {}
    for seed in (3, 4):
        compare_traces(off_by(reference, 1e-2, seed), off_by(reference, 1e-2, 2), reference, torch.float32, known)
    assert calls == ["prefill", "decode"]
