"""The plan alone; what it is good for is in test_engine.py."""

from __future__ import annotations

from qwen2_npu.emulator.ge.memory import Access, Copies, plan_copies

NOTHING = Copies()


def plan(*accesses: Access, constants: tuple[int, ...] = (), outputs: tuple[int, ...] = ()) -> list[Copies]:
    return plan_copies(accesses, frozenset(constants), outputs)


def view(of: int, made: int) -> Access:
    return Access((of,), (made,), view_of=of)


def write(target: int, made: int, *reads: int) -> Access:
    return Access((target, *reads), (made,), {made: target})


def read(*slots: int, made: int = 99) -> Access:
    return Access(slots, (made,))


def test_a_view_that_is_read_after_the_write_is_copied_before_it() -> None:
    assert plan(view(0, 1), write(0, 2), read(1)) == [NOTHING, Copies(snapshots=(1,)), NOTHING]


def test_a_view_that_the_writer_itself_reads_is_copied() -> None:
    assert plan(view(0, 1), write(0, 2, 1)) == [NOTHING, Copies(snapshots=(1,))]


def test_a_view_that_is_returned_is_copied() -> None:
    assert plan(view(0, 1), write(0, 2), outputs=(1,)) == [NOTHING, Copies(snapshots=(1,))]


def test_a_view_that_nobody_reads_any_more_is_not_copied() -> None:
    assert plan(view(0, 1), read(1), write(0, 2)) == [NOTHING] * 3


def test_a_view_made_after_the_write_is_not_copied() -> None:
    assert plan(write(0, 1), view(1, 2), read(2)) == [NOTHING] * 3


def test_views_of_views_and_of_written_results_are_found() -> None:
    assert plan(view(0, 1), view(1, 2), write(0, 3), read(2))[2] == Copies(snapshots=(2,))
    assert plan(write(0, 1), view(1, 2), write(1, 3), read(2))[2] == Copies(snapshots=(2,))


def test_a_copied_view_is_not_copied_again() -> None:
    assert plan(view(0, 1), write(0, 2), write(2, 3), read(1))[2] == NOTHING


def test_a_view_that_is_written_gets_memory_of_its_own() -> None:
    assert plan(view(0, 1), write(1, 2), read(0)) == [Copies(results=True), NOTHING, NOTHING]


def test_a_written_constant_is_copied_for_the_writer() -> None:
    assert plan(write(0, 1), read(0), constants=(0,)) == [Copies(constants=(0,)), NOTHING]


def test_a_written_view_of_a_constant_gets_memory_of_its_own() -> None:
    assert plan(view(0, 1), write(1, 2), constants=(0,)) == [Copies(results=True), NOTHING]


def test_other_memory_is_left_alone() -> None:
    assert plan(view(0, 1), write(5, 2), read(1)) == [NOTHING] * 3
