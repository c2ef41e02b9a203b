import numpy as np
import pytest

from qwen2_npu.conformance.accuracy.batches import (
    BATCH_SHAPES,
    Batch,
    random_batch,
    random_continuation,
    text_batch,
    text_continuation,
)


def test_padding_is_on_the_left() -> None:
    batch = Batch.of([[1, 2, 3], [4]], pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.lengths == [3, 1]
    assert [row.input_ids.tolist() for row in batch.rows()] == [[[1, 2, 3]], [[4]]]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Batch.of(prompts)


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_batches_have_their_shape_and_are_repeatable(shape: str) -> None:
    assert random_batch(shape, 100).lengths == list(BATCH_SHAPES[shape])
    assert random_batch(shape, 100).input_ids.tolist() == random_batch(shape, 100).input_ids.tolist()
    assert text_batch(shape, range(50)).lengths == list(BATCH_SHAPES[shape])


def test_short_text_is_named() -> None:
    with pytest.raises(ValueError, match="has 5 tokens"):
        text_batch("one", range(5))
    with pytest.raises(ValueError, match="has 16 tokens; batch shape 'four' needs 17"):
        text_batch("four", range(16))
    assert text_batch("four", range(17)).input_ids.tolist() == [list(range(17))] * 4


def test_a_continuation_follows_its_row_and_begins_anew_at_the_end() -> None:
    for shape, lengths in BATCH_SHAPES.items():
        ends = [batch.input_ids[0, -1].item() for batch in text_batch(shape, range(50)).rows()]
        assert text_continuation(shape, range(50), 60).tolist() == [
            [(end + 1 + step) % 50 for step in range(60)] for end in ends
        ]
        random = random_continuation(shape, 100, 5)
        assert random.shape == (len(lengths), 5)
        assert random.tolist() == random_continuation(shape, 100, 5).tolist()
        assert 0 <= random.min() <= random.max() < 100
    assert text_continuation("four", range(50), 0).shape == (4, 0)


def test_a_short_text_has_no_continuation() -> None:
    with pytest.raises(ValueError, match="has 5 tokens"):
        text_continuation("one", range(5), 1)


def test_the_shapes_are_a_row_a_batch_and_rows_of_any_length() -> None:
    """What each is for: no padding, no padding in several rows, padding in most of them and a row of one token."""
    assert BATCH_SHAPES == {"one": (17,), "four": (17, 17, 17, 17), "ragged": (17, 9, 1, 12)}


def test_a_batch_is_padded_with_zeros_unless_told_otherwise() -> None:
    for batch, pad in ((Batch.of([[5, 6], [7]]), 0), (Batch.of([[5], [6, 7], [8]], pad_token_id=3), 3)):
        assert batch.input_ids[batch.attention_mask == 0].unique().tolist() == [pad]
    ragged = text_batch("ragged", range(1, 50))
    assert ragged.input_ids[1].tolist()[:8] == [0] * 8
    assert text_batch("ragged", range(1, 50), pad_token_id=99).input_ids[1, 0] == 99


def test_rows_alone_keep_their_tokens_and_have_a_mask_of_ones() -> None:
    first, second = Batch.of([[1, 2, 3], [4]], pad_token_id=9).rows()
    assert (first.input_ids.tolist(), first.attention_mask.tolist()) == ([[1, 2, 3]], [[1, 1, 1]])
    assert (second.input_ids.tolist(), second.attention_mask.tolist()) == ([[4]], [[1]])


def test_windows_are_spread_from_the_first_token_to_the_last() -> None:
    starts = [int(row[0]) for row in text_batch("four", range(17 + 30)).input_ids]
    assert starts == [0, 10, 20, 30]
    assert text_batch("one", range(50)).input_ids[0, 0] == 0


def test_random_tokens_are_of_the_seed() -> None:
    for make in (
        lambda **seed: random_batch("four", 100, **seed).input_ids.tolist(),
        lambda **seed: random_continuation("four", 100, 5, **seed).tolist(),
    ):
        assert make(seed=3) == make(seed=3) != make(seed=4)
    assert random_batch("four", 100).input_ids.tolist() == random_batch("four", 100, seed=0).input_ids.tolist()
    following = random_continuation("four", 100, 5)
    assert following.tolist() == random_continuation("four", 100, 5, seed=1).tolist()


def test_nothing_forced_is_no_token_for_each_row() -> None:
    forced = Batch.of([[1, 2, 3], [4]]).nothing_forced()
    assert (forced.shape, forced.dtype) == ((2, 0), np.int64)
