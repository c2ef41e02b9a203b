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
