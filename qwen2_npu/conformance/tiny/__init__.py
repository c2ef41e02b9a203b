"""The trained tiny Qwen2 checkpoint: its folder, prompts that it continues readably, and held-out text.

Reading these needs neither torch nor transformers. How the checkpoint came to be: ``README.md`` beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
"""Ends every document in training; a special token of this checkpoint as of the real Qwen2."""


def path() -> Path:
    """The folder of the checkpoint, in the ordinary Hugging Face layout."""
    return _FOLDER


def prompts() -> tuple[str, ...]:
    """Beginnings of stories, lists and sums, English and Chinese, that greedy decoding continues readably."""
    return tuple(_prompts()["text"])


def chat_prompts() -> tuple[str, ...]:
    """What a user says; goes through the chat template."""
    return tuple(_prompts()["chat"])


def heldout_documents() -> tuple[str, ...]:
    """Documents of the training grammar, English and Chinese in turn, that the training text does not contain."""
    return tuple((_FOLDER / "heldout.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n"))


def heldout_text() -> str:
    """The held-out documents as one string, each ended by ``<|endoftext|>`` as in training; tokenise it as it is."""
    return "".join(document + END_OF_TEXT for document in heldout_documents())


def _prompts() -> dict[str, list[str]]:
    content: dict[str, list[str]] = json.loads((_FOLDER / "prompts.json").read_text(encoding="utf-8"))
    return content
