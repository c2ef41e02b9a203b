import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2_npu.conformance.accuracy import compare
from qwen2_npu.conformance.accuracy.compare import (
    Comparison,
    KnownPath,
    Mismatch,
    PathComparison,
    compare_traces,
    kl_divergence,
    log_softmax,
)
from qwen2_npu.conformance.accuracy.noise import RMS_FACTOR, ErrorRatio
from qwen2_npu.conformance.accuracy.teacher_forcing import Array, Trace

ROWS, WIDTH, STEPS, VOCABULARY = 2, 3, 3, 5
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


def test_padding_is_never_compared() -> None:
    for path in ("prefill", "hidden"):
        for who in range(3):
            traces = exact_traces()
            part(traces[who], path)[~VALID] = np.nan
            assert compared(*traces).passed, (path, who)


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


# ---- each rule alone, at its limit ----------------------------------------------------------------------------------
NOISE = 2.0**-10
"""Of a path's first position; each after it has a quarter of this more. Exact in float32: no rounding floor
interferes."""

HALF_STEP = 2.0**-21
"""Of float32 at 8, the largest logit of the traces below."""

BEYOND = 1 + 1e-9
PLACES = {
    "prefill": [(int(row), int(column)) for row, column in np.argwhere(VALID)],
    "hidden": [(int(row), int(column)) for row, column in np.argwhere(VALID)],
    "last_token": [(row, 0) for row in range(ROWS)],
    "decode": [(row, step) for row in range(ROWS) for step in range(STEPS)],
}
"""Path -> where its positions are: row and column, or row and decode step."""

EVERY_PLACE = [(path, place) for path, places in PLACES.items() for place in places]
TOKEN_PLACES = [(path, place) for path, place in EVERY_PLACE if path != "hidden"]
LENGTHS = VALID.sum(axis=1)


def part(trace: Trace, path: str) -> Array:
    """What the trace says on a path, (rows, positions, values), as a view: the last token's are stored by row."""
    if path == "last_token":
        assert trace.last_logits is not None
        return trace.last_logits[:, None]
    found = {"prefill": trace.prefill_logits, "hidden": trace.hidden, "decode": trace.decode_logits}[path]
    assert found is not None
    return found


def in_the_row(path: str, row: int, column: int) -> int:
    """The position that a message names: tokens of the row before this one."""
    if path == "last_token":
        return int(LENGTHS[row]) - 1
    return int(LENGTHS[row]) + column if path == "decode" else column - (WIDTH - int(LENGTHS[row]))


def exact_traces() -> tuple[Trace, Trace, Trace]:
    """Optimised, baseline and reference on all four paths: token 0 is 8 above all others, the first two are equal."""

    def plain() -> Trace:
        parts = [np.zeros((ROWS, count, VOCABULARY)) for count in (WIDTH, STEPS, WIDTH, 1)]
        for values in parts:
            values[..., 0] = 8.0
        return replace(trace(parts[0], parts[1]), hidden=parts[2], last_logits=parts[3][:, 0])

    reference, baseline, optimised = plain(), plain(), plain()
    for noisy in (baseline, optimised):
        for path, places in PLACES.items():
            for index, place in enumerate(places):
                part(noisy, path)[place] += NOISE * (1 + index / 4)
    # The last token's baseline is the last column of the prefill.
    assert optimised.last_logits is not None
    optimised.last_logits[...] = baseline.prefill_logits[:, -1]
    return optimised, baseline, reference


def compared(optimised: Trace, baseline: Trace, reference: Trace) -> Comparison:
    return compare_traces(optimised, baseline, reference, torch.float32)


def baseline_part(baseline: Trace, path: str) -> Array:
    return baseline.prefill_logits[:, -1:] if path == "last_token" else part(baseline, path)


def expect_one_failure(result: Comparison, path: str, text: str) -> None:
    """The path alone fails, and the message says what."""
    assert not result.passed
    assert [each.path for each in result.paths if not each.passed] == [path]
    (line,) = result.failures()
    assert line.startswith(f"{path}"), line
    assert text in line


def test_the_exact_traces_pass_on_every_path() -> None:
    result = compared(*exact_traces())
    assert result.passed
    assert {each.path: each.positions for each in result.paths} == {path: len(at) for path, at in PLACES.items()}
    assert all(each.error.ratio == 1 for each in result.paths)
    assert result.positions == result.agreements == sum(len(PLACES[path]) for path in PLACES if path != "hidden")


@pytest.mark.parametrize(("path", "place"), EVERY_PLACE)
def test_the_error_of_each_position_counts_up_to_its_limit(path: str, place: tuple[int, int]) -> None:
    """One value of one position carries all that its path may be off by: RMS 1.5 times the baseline's."""
    for factor, passed in ((1 / BEYOND, True), (BEYOND, False)):
        optimised, baseline, reference = exact_traces()
        true = reference.prefill_logits[:, -1:] if path == "last_token" else part(reference, path)
        places = [(row, 0) for row in range(ROWS)] if path == "last_token" else PLACES[path]
        squares = sum(((baseline_part(baseline, path)[at] - true[at]) ** 2).sum() for at in places)
        mine = (part(optimised, path)[(*place, 1)] - true[(*place, 1)]) ** 2
        allowed = RMS_FACTOR**2 * squares - (squares - mine)
        part(optimised, path)[(*place, 1)] = true[(*place, 1)] + factor * np.sqrt(allowed)
        result = compared(optimised, baseline, reference)
        assert not result.unexcused
        if passed:
            assert result.passed, result.failures()
        else:
            what = "hidden states" if path == "hidden" else "logits"
            expect_one_failure(result, path, f"RMS error of the {what} ")
            assert result.failures()[0].endswith(f", allowed {RMS_FACTOR} ×")


@pytest.mark.parametrize(("path", "place"), TOKEN_PLACES)
def test_another_token_at_each_position_is_excused_up_to_its_limit(path: str, place: tuple[int, int]) -> None:
    """The margin may be twice the noise of that very position; the error as a whole stays within its own limit."""
    for beyond, passed in ((0.0, True), (2.0**-40, False)):
        optimised, baseline, reference = exact_traces()
        where, at = ("prefill", (place[0], WIDTH - 1)) if path == "last_token" else (path, place)
        noise = part(baseline, where)[(*at, 0)] - 8.0
        margin = 2 * noise + beyond
        for each in (optimised, baseline, reference):
            part(each, where)[(*at, 1)] += 8.0 - margin
        optimised.last_logits[...] = baseline.prefill_logits[:, -1]  # type: ignore[index]
        part(optimised, path)[(*place, 1)] = part(optimised, path)[(*place, 0)] + 2.0**-41
        result = compared(optimised, baseline, reference)
        assert all(each.error.within for each in result.paths)
        (mismatch,) = (result.excused, result.unexcused)[not passed]
        assert result.agreements == result.positions - 1
        assert (mismatch.path, mismatch.row, mismatch.position) == (path, place[0], in_the_row(path, *place))
        assert (mismatch.baseline_token, mismatch.optimised_token) == (0, 1)
        assert (mismatch.margin, mismatch.noise) == (margin, noise)
        if passed:
            assert result.passed, result.failures()
            assert not result.unexcused
            assert "within 2 × noise" in str(mismatch)
        else:
            assert not result.excused
            expect_one_failure(result, path, f"row {place[0]} position {in_the_row(path, *place)}: baseline prefers")
            assert "beyond 2 × noise" in result.failures()[0]


@pytest.mark.parametrize("path", PLACES)
def test_nan_on_each_path_fails_it(path: str) -> None:
    optimised, baseline, reference = exact_traces()
    part(optimised, path)[(*PLACES[path][-1], 3)] = np.nan
    result = compared(optimised, baseline, reference)
    assert [each.path for each in result.paths if not each.passed] == [path]
    assert np.isnan(result.rms_ratio)


@pytest.mark.parametrize("who", ["optimised", "reference"])
def test_other_forced_tokens_of_either_are_refused(who: str) -> None:
    traces = dict(zip(("optimised", "baseline", "reference"), exact_traces(), strict=True))
    forced = traces[who].forced.copy()
    forced[-1, -1] = 1
    traces[who] = replace(traces[who], forced=forced)
    with pytest.raises(ValueError, match="different tokens"):
        compared(*traces.values())


@pytest.mark.parametrize("who", ["baseline", "reference"])
def test_hidden_states_without_those_of_the_others_are_refused(who: str) -> None:
    traces = dict(zip(("optimised", "baseline", "reference"), exact_traces(), strict=True))
    traces[who] = replace(traces[who], hidden=None)
    with pytest.raises(ValueError, match="run both with hidden=True"):
        compared(*traces.values())


def test_paths_that_were_not_run_are_not_compared() -> None:
    optimised, baseline, reference = exact_traces()
    short = [
        replace(each, decode_logits=each.decode_logits[:, :0], forced=each.forced[:, :0], hidden=None, last_logits=None)
        for each in (optimised, baseline, reference)
    ]
    assert [each.path for each in compared(*short).paths] == ["prefill"]


def test_no_position_is_no_pass() -> None:
    optimised, baseline, reference = exact_traces()
    empty = Comparison(tuple(each for each in compared(optimised, baseline, reference).paths if each.path == "hidden"))
    assert not empty.passed
    assert empty.failures() == ["no position was compared"]
    assert (empty.agreement, empty.kl_mean, empty.max_logit_error, empty.kl_max) == (0.0, 0.0, 0.0, 0.0)
    assert Comparison(()).rms_ratio == 0.0


def path_of(name: str, positions: int, **changes: Any) -> PathComparison:
    plain = PathComparison(name, positions, positions, (), 1.0, 1.0, 1.0, ErrorRatio(1.0, 1.0, 0.0))
    return replace(plain, **changes)


def test_totals_are_of_all_paths_with_tokens() -> None:
    excused, missed = (Mismatch("decode", 0, 1, 2, 3, 0.5, 0.5, within) for within in (True, False))
    result = Comparison((
        path_of("prefill", 3, agreements=2, max_error=2.0, kl_mean=0.5, kl_max=4.0, mismatches=(excused,)),
        path_of("hidden", 7, max_error=9.0, kl_mean=9.0, kl_max=9.0, error=ErrorRatio(5.0, 2.0, 4.0)),
        path_of("decode", 1, agreements=0, max_error=1.0, kl_mean=2.5, kl_max=2.5, mismatches=(missed, excused)),
    ))  # fmt: skip
    assert (result.positions, result.agreements, result.agreement) == (4, 2, 0.5)
    assert (result.max_logit_error, result.kl_mean, result.kl_max, result.rms_ratio) == (2.0, 1.0, 4.0, 1.25)
    assert (result.excused, result.unexcused, result.passed) == ((excused, excused), (missed,), False)
    written = result.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert {key: written[key] for key in ("positions", "agreements", "agreement", "passed")} == {
        "positions": 4, "agreements": 2, "agreement": 0.5, "passed": False,
    }  # fmt: skip
    assert (written["max_logit_error"], written["kl_mean"], written["kl_max"], written["rms_ratio"]) == (
        2.0, 1.0, 4.0, 1.25,
    )  # fmt: skip
    assert (written["excused"], written["unexcused"]) == ([asdict(excused)] * 2, [asdict(missed)])
    assert written["paths"]["hidden"] == {
        "positions": 7, "agreements": 7, "max_error": 9.0, "kl_mean": 9.0, "kl_max": 9.0, "rms_optimised": 5.0,
        "rms_baseline": 2.0, "rms_floor": 4.0, "rms_ratio": 1.25, "passed": True,
    }  # fmt: skip
    assert list(written["paths"]) == ["prefill", "hidden", "decode"]


def test_the_worst_of_a_total_may_be_on_any_path_and_every_mismatch_is_kept() -> None:
    first, second = (Mismatch("decode", row, 1, 2, 3, 0.5, 0.1, False) for row in (0, 1))
    result = Comparison((
        path_of("prefill", 1, max_error=1.0, kl_max=1.0, error=ErrorRatio(0.5, 1.0, 0.0)),
        path_of("decode", 2, max_error=2.0, kl_max=3.0, error=ErrorRatio(0.75, 1.0, 0.0), mismatches=(first, second)),
    ))  # fmt: skip
    assert (result.max_logit_error, result.kl_max, result.rms_ratio) == (2.0, 3.0, 0.75)
    assert result.unexcused == (first, second)
    assert result.to_dict()["unexcused"] == [asdict(first), asdict(second)]
    assert result.failures() == [str(first), str(second)]
    excused = [replace(each, excused=True) for each in (first, second)]
    result = Comparison((path_of("decode", 2, mismatches=tuple(excused)),))
    assert (result.passed, result.excused, result.to_dict()["excused"]) == (
        True,
        tuple(excused),
        [*map(asdict, excused)],
    )


def test_one_position_is_enough_to_compare() -> None:
    assert Comparison((path_of("prefill", 1),)).passed


def test_large_logits_have_a_softmax() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[1e4, 0.0], [-1e4, 0.0]])), [[0.0, -1e4], [-1e4, 0.0]])


def test_figures_of_a_path_are_of_its_worst_and_its_mean_position() -> None:
    optimised, baseline, reference = exact_traces()
    part(optimised, "decode")[1, 0, 4] += 3.0
    part(optimised, "hidden")[1, 0, 2] -= 0.25
    by_name = {each.path: each for each in compared(optimised, baseline, reference).paths}
    kl = kl_divergence(baseline.decode_logits.reshape(-1, VOCABULARY), optimised.decode_logits.reshape(-1, VOCABULARY))
    assert (by_name["decode"].kl_mean, by_name["decode"].kl_max) == (kl.mean(), kl.max())
    assert kl.max() > 3 * kl.mean() > 0
    assert by_name["decode"].max_error == 3.0
    assert by_name["hidden"].max_error == 0.25
    assert (by_name["hidden"].agreements, by_name["hidden"].kl_mean, by_name["hidden"].kl_max) == (0, 0.0, 0.0)


def test_the_floor_of_a_path_is_the_rounding_of_its_reference() -> None:
    """A baseline without any error allows 1.5 times what one rounding of the reference to the dtype costs."""
    generator = np.random.default_rng(7)
    parts = [generator.normal(size=(ROWS, count, VOCABULARY)) for count in (WIDTH, STEPS)]
    exact_trace = trace(*parts)
    wanted = torch.from_numpy(exact_trace.prefill_logits[VALID])
    floor = ((wanted.to(torch.bfloat16).double() - wanted) ** 2).mean().sqrt().item()
    for factor, passed in ((1 / BEYOND, True), (BEYOND, False)):
        shifted = replace(exact_trace, prefill_logits=exact_trace.prefill_logits + factor * RMS_FACTOR * floor)
        result = compare_traces(shifted, exact_trace, exact_trace, torch.bfloat16)
        assert result.passed == passed, result.failures()


# ---- neighbours of the dtype ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["prefill", "last_token", "decode"])
def test_neighbours_of_the_dtype_are_a_near_tie_however_exact_the_baseline_is(path: str) -> None:
    """8.3125 and 8.25 in bfloat16: the baseline has no error there, and rounding once may err by half of that."""
    for margin, excused in ((2.0**-4, True), (2.0**-4 + 2.0**-40, False)):
        exact = trace(*(np.full((ROWS, count, VOCABULARY), -1.0) for count in (WIDTH, STEPS)))
        for values in (exact.prefill_logits, exact.decode_logits):
            values[..., 0], values[..., 1] = 8.3125, 8.3125 - margin
        last = exact.prefill_logits[:, -1].copy()
        ours = replace(exact, prefill_logits=exact.prefill_logits.copy(), decode_logits=exact.decode_logits.copy())
        ours = replace(ours, last_logits=last)
        part(ours, path)[(*PLACES[path][-1], 1)] = 8.5
        found = compare_traces(ours, exact, exact, torch.bfloat16)
        (mismatch,) = found.excused if excused else found.unexcused
        assert (mismatch.path, mismatch.margin, mismatch.noise) == (path, margin, 2.0**-5)


# ---- 8-bit weights: the noise of a position is at least what is usual ------------------------------------------------
def uneven(prefill: Array, decode: Array) -> tuple[Trace, Trace]:
    """Baseline and reference whose noise at each position is that (rows, positions)."""
    reference = exact_traces()[2]
    baseline = replace(
        reference,
        prefill_logits=reference.prefill_logits + prefill[..., None],
        decode_logits=reference.decode_logits + decode[..., None],
    )
    return replace(baseline, hidden=None), replace(reference, hidden=None)


@pytest.mark.parametrize("pooled", [False, True])
def test_another_token_where_the_baseline_was_lucky(pooled: bool) -> None:
    """It is excused up to twice the RMS of the noise of the path's positions; and without pooling not at all."""
    decode = np.full((ROWS, STEPS), NOISE)
    decode[1, 1] = 0
    baseline, reference = uneven(np.zeros((ROWS, WIDTH)), decode)
    usual = np.sqrt((NOISE**2 * (decode.size - 1) + HALF_STEP**2) / decode.size)
    for beyond in (-(2.0**-40), 2.0**-40):
        given = [replace(each, decode_logits=each.decode_logits.copy()) for each in (baseline, baseline, reference)]
        for each in given:
            each.decode_logits[1, 1, 1] = each.decode_logits[1, 1, 0] - 2 * usual - beyond
        given[0].decode_logits[1, 1, 1] = given[0].decode_logits[1, 1, 0] + 2.0**-41
        ours = replace(given[0], last_logits=None)
        found = compare_traces(ours, *given[1:], torch.float32, pooled=pooled)
        decoded = next(path for path in found.paths if path.path == "decode")
        assert len(decoded.mismatches) == 1
        assert bool(decoded.excused) is (pooled and beyond < 0)


@pytest.mark.parametrize(("beyond", "within"), [(1 - 1e-9, True), (1 + 1e-9, False)])
@pytest.mark.parametrize(
    ("pooled", "positions"),
    [pytest.param(False, [3, 0, 1, 2, 0], id="all"), pytest.param(True, [3, 2], id="8-bit weights")],
)
def test_last_tokens_have_at_least_the_noise_of_their_prefill(
    pooled: bool, positions: list[int], beyond: float, within: bool
) -> None:
    baseline, reference = uneven(NOISE * np.array([[9, 3, 0], [1, 2, 0]]), np.zeros((ROWS, STEPS)))
    usual = NOISE * np.sqrt(np.square(positions).mean())
    ours = replace(baseline, last_logits=reference.prefill_logits[:, -1] + beyond * RMS_FACTOR * usual)
    found = compare_traces(ours, baseline, reference, torch.float32, pooled=pooled)
    last = next(path for path in found.paths if path.path == "last_token")
    assert last.error.within is within


def test_where_all_positions_have_the_same_noise_pooling_changes_nothing() -> None:
    baseline, reference = uneven(np.full((ROWS, WIDTH), NOISE), np.full((ROWS, STEPS), NOISE))
    ours = replace(baseline, last_logits=baseline.prefill_logits[:, -1] + NOISE / 3)
    one, other = (compare_traces(ours, baseline, reference, torch.float32, pooled=each) for each in (False, True))
    assert [path.error.ratio for path in one.paths] == pytest.approx([path.error.ratio for path in other.paths])
    assert other.positions == one.positions
