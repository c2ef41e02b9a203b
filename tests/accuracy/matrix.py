"""Which combinations of many settings to run when there is no time for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations, product


def pairwise(*axes: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    """Few combinations in which every value of every axis meets every value of every other axis at least once.

    Greedy and deterministic: always the combination that adds most new pairs, the first of them in product order.
    """
    left = {(i, a, j, b) for (i, first), (j, second) in combinations(enumerate(axes), 2) for a in first for b in second}
    candidates = {combination: _pairs(combination) for combination in product(*axes)}
    chosen: list[tuple[Hashable, ...]] = []
    while left:
        best = max(candidates, key=lambda combination: len(candidates[combination] & left))
        chosen.append(best)
        left -= candidates.pop(best)
    return chosen or list(candidates)


def _pairs(combination: tuple[Hashable, ...]) -> frozenset[tuple[int, Hashable, int, Hashable]]:
    return frozenset((i, a, j, b) for (i, a), (j, b) in combinations(enumerate(combination), 2))
