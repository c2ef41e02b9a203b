"""The two tools every language of the corpus shares: choosing, and filling a template.

All randomness comes from one ``random.Random`` that the caller seeds: the same seed gives the same text, byte by byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

Cast = dict[str, str]
"""The slots of one document: a name, a place, an object ... that its sentences recall."""

Writer = Callable[[random.Random], str]
"""Writes one document. A document has no empty line and does not end in a newline."""


def fill(rng: random.Random, stages: Sequence[Sequence[str]], cast: Mapping[str, str]) -> list[str]:
    """One sentence (or short run of sentences) per stage: a random alternative with its slots filled from ``cast``."""
    return [rng.choice(alternatives).format_map(cast) for alternatives in stages]


def mixed(writers: Sequence[tuple[int, Writer]]) -> Writer:
    """A writer that picks one of ``writers`` by weight for every document."""
    weights = [weight for weight, _ in writers]

    def write(rng: random.Random) -> str:
        return rng.choices(writers, weights)[0][1](rng)

    return write
