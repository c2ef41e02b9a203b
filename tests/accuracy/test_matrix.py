from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from tests.accuracy.matrix import pairwise

AXES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(AXES)
def test_every_pair_is_covered(sizes: list[int]) -> None:
    axes = [[f"{axis}.{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    chosen = pairwise(*axes)
    assert len(set(chosen)) == len(chosen)
    for first, second in combinations(range(len(axes)), 2):
        met = {(case[first], case[second]) for case in chosen}
        assert met == set(product(axes[first], axes[second]))


def test_it_is_far_smaller_than_the_product_and_repeatable() -> None:
    axes = [range(16), range(3), range(3), range(6)]
    assert len(pairwise(*axes)) <= 110
    assert pairwise(*axes) == pairwise(*axes)
