"""The text the tiny checkpoint learns from: written by the seeded grammar in this folder, and by nothing else.

The grammar is part of the project and under its licence (Apache-2.0); no outside text enters. ``random.Random(seed)``
makes the choices, so a seed gives the same text on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Set

from tiny_corpus import chat, chinese, english
from tiny_corpus.grammar import Writer, mixed

SYSTEM = chat.SYSTEM
END = "<|endoftext|>"
"""Ends every document."""

ALL: Writer = mixed(((40, english.write), (38, chinese.write), (22, chat.conversation)))


def documents(seed: int, writer: Writer = ALL, *, without: Set[str] = frozenset()) -> Iterator[str]:
    """Documents without end, leaving out those in ``without``."""
    rng = random.Random(seed)
    while True:
        if (document := writer(rng)) not in without:
            yield document


def heldout(seed: int, per_language: int) -> list[str]:
    """Different documents, English and Chinese in turn, to be left out of the training text."""
    found: list[str] = []
    streams = documents(seed, english.write), documents(seed + 1, chinese.write)
    while len(found) < 2 * per_language:
        stream = streams[len(found) % 2]
        found.append(next(document for document in stream if document not in found))
    return found
