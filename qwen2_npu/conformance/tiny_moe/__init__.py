"""The trained tiny mixture of experts: the folder of a checkpoint of the kind of Qwen2-57B-A14B.

Its text, prompts and tokenizer are those of ``conformance.tiny``. How it came to be: ``README.md`` beside this file.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder, in the ordinary Hugging Face layout. transformers 4.37.0 has no such model."""
    return Path(__file__).resolve().parent
