"""The tokenizer of a checkpoint folder and its chat template, every fault in them named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2_npu.checkpoint.configuration import one_line
from qwen2_npu.checkpoint.folders import check_readable, is_file, unreadable
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import CheckpointError, UnsupportedError

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
"""Files that a vocabulary is read from: one of these groups, whole."""

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Files beside them that are read where they are there."""

TEMPLATE_FILES = ("tokenizer_config.json",) if IS_V4 else ("chat_template.jinja", "tokenizer_config.json")
"""Where a chat template is, the first that there is."""


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None if it has none.

    Raises:
        CheckpointError: there is one, but files of it are missing or cannot be read.
    """
    vocabulary = {name for group in VOCABULARIES for name in group}
    there = {name for name in (*sorted(vocabulary), *SETTINGS) if is_file(folder / name)}
    if not there.intersection({*vocabulary, "tokenizer_config.json"}):
        return None
    for name in sorted(there):
        check_readable(folder / name)
    if not any(there.issuperset(group) for group in VOCABULARIES):
        begun = next((group for group in VOCABULARIES if there.intersection(group)), VOCABULARIES[0])
        missing = " and ".join(name for name in begun if name not in there)
        raise CheckpointError(f"{folder}: its tokenizer has no {missing}; fetch it from where the checkpoint is from")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokens = tokenizer("a")["input_ids"]
    except PermissionError as error:  # transformers lists the folder, too
        raise unreadable(Path(error.filename or folder), error) from error
    except Exception as error:  # transformers and tokenizers raise types of their own
        reason = one_line(error)
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {reason}; fetch its files again") from error
    if not tokens:
        raise CheckpointError(f"{folder}: its tokenizer makes no token of a letter; fetch its files again")
    return tokenizer


def chat_text(tokenizer: Any, prompt: str) -> str:
    """``prompt`` as what a user says, through the chat template of ``tokenizer``, up to where the answer begins.

    Raises:
        UnsupportedError: there is no template, or nothing to render it with.
        CheckpointError: the template is broken, or does not take the prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError("--chat: this checkpoint's tokenizer has no chat template; leave --chat out")
    try:
        import jinja2  # noqa: F401 - what transformers renders templates with
    except ImportError as error:
        raise UnsupportedError("--chat: chat templates need jinja2: pip install 'jinja2>=3.1'") from error
    messages = [{"role": "user", "content": prompt}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever the template does: it is a program
        raise _broken(tokenizer, f"fails: {type(error).__name__}: {one_line(error)}") from error
    if not text:
        raise _broken(tokenizer, "makes nothing of the prompt")
    return text


def _broken(tokenizer: Any, fault: str) -> CheckpointError:
    folder = Path(tokenizer.name_or_path)
    path = next((folder / name for name in TEMPLATE_FILES if (folder / name).is_file()), folder)
    return CheckpointError(f"{path}: its chat template {fault}; correct it, fetch the file again, or leave --chat out")
