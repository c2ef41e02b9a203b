"""Tokenizers as they come: with files missing or broken, and chat templates that do anything but render."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

from qwen2_npu.checkpoint import tokenizer
from qwen2_npu.checkpoint.tokenizer import chat_text, load_tokenizer
from qwen2_npu.cli import main
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.small import V4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path(), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# ---- files ----------------------------------------------------------------------------------------------------------
def vocabulary_alone(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    (folder / "tokenizer.json").unlink()


def without(*names: str, after: Callable[[Path], None] = lambda folder: None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        after(folder)
        for name in names:
            (folder / name).unlink()

    return spoil


def containing(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None  # type: ignore[func-returns-value]


def empty_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    edit(path, model=model | {"vocab": {}, "merges": []}, added_tokens=[])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("tokenizer.json"), "its tokenizer has no tokenizer.json; fetch it from where"),
        (without("merges.txt", after=vocabulary_alone), "its tokenizer has no merges.txt; fetch it from where"),
        (without("vocab.json", after=vocabulary_alone), "its tokenizer has no vocab.json; fetch it from where"),
        (empty_vocabulary, "its tokenizer makes no token of a letter; fetch its files again"),
        (containing("tokenizer.json", "{}"), "its tokenizer cannot be read: "),
        (containing("tokenizer.json", ""), "its tokenizer cannot be read: "),
        (containing("tokenizer_config.json", "[]"), "its tokenizer cannot be read: "),
        (containing("tokenizer_config.json", '{"a":' * 10**5), "its tokenizer cannot be read: "),
    ],
)
def test_a_tokenizer_that_is_broken(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: {message}")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="its tokenizer"):
        ModelPair.of_checkpoint(folder)
    result = CliRunner().invoke(main, ["generate", "--model-path", str(folder), "--prompt", "x"])
    assert (result.exit_code, result.output) == (2, f"error: {caught.value}\n")


@pytest.mark.parametrize("change", [without("tokenizer_config.json"), vocabulary_alone])
def test_a_tokenizer_in_fewer_or_other_files(folder, change):
    text = tiny.prompts()[0]
    expected = load_tokenizer(folder)(text)["input_ids"]
    change(folder)
    assert load_tokenizer(folder)(text)["input_ids"] == expected


@pytest.mark.parametrize("broken", ["config.json", "folder"])
def test_another_fault_is_not_called_the_tokenizer_s(folder, broken):
    if broken == "folder":
        shutil.rmtree(folder)
    else:
        (folder / "config.json").write_text("{")
        edit(folder / "tokenizer_config.json", tokenizer_class=None)
    result = CliRunner().invoke(main, ["generate", "--model-path", str(folder), "--prompt", "x"])
    assert result.exit_code == 2
    assert ("config.json is not valid JSON" if broken == "config.json" else "is not a folder") in result.output


def test_no_tokenizer_at_all(folder):
    without("tokenizer.json", "tokenizer_config.json")(folder)
    assert load_tokenizer(folder) is None


# ---- chat templates -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for x in %}", "fails: TemplateSyntaxError: Expected an expression"),
        ("{{ raise_exception('only\nsystem') }}", "fails: TemplateError: only system"),
        ("{{ messages[7].content }}", "fails: UndefinedError: list object has no element 7"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: OverflowError: Range too big"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__[1] }}", "fails: SecurityError: "),
        ([{"name": "tools", "template": "x"}], "fails: TypeError: " if V4 else "fails: ValueError: "),
        (5, "fails: TypeError: "),
        ("{% if false %}x{% endif %}", "makes nothing of the prompt"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"][: 1 if V4 else 2])
def test_a_template_that_is_broken(folder, template, fault, file):
    path = folder / file
    if path.suffix == ".json":
        edit(path, chat_template=template)
    elif isinstance(template, str):
        path.write_text(template, encoding="utf-8")
    else:
        pytest.skip("the file holds text alone")
    result = CliRunner().invoke(main, ["generate", "--model-path", str(folder), "--prompt", "x", "--chat"])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {path}: its chat template {fault}")
    assert result.output.endswith("; correct it, fetch the file again, or leave --chat out\n")
    assert result.output.count("\n") == 1


def test_no_template(folder):
    edit(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UnsupportedError, match="has no chat template; leave --chat out"):
        chat_text(load_tokenizer(folder), "x")


def test_nothing_to_render_it_with(monkeypatch):
    tokenizer = load_tokenizer(tiny.path())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UnsupportedError, match=r"need jinja2: pip install 'jinja2>=3\.1'"):
        chat_text(tokenizer, "x")


def test_a_template_that_renders():
    """Up to where the answer begins: else the model would continue with the next turn of its own choice."""
    text = chat_text(load_tokenizer(tiny.path()), "Who are you?")
    assert text.endswith("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("Who are you?") == 1


def test_every_file_of_it_is_asked_whether_it_may_be_read(folder, monkeypatch):
    vocabulary_alone(folder)
    beside = {"special_tokens_map.json": "{}", "added_tokens.json": "{}", "chat_template.jinja": "x"}
    for name, text in beside.items():
        (folder / name).write_text(text)
    asked = []
    monkeypatch.setattr(tokenizer, "check_readable", asked.append)
    load_tokenizer(folder)
    assert {path.name for path in asked} == {"vocab.json", "merges.txt", "tokenizer_config.json", *beside}
    assert all(path.exists() for path in asked)


@pytest.mark.parametrize("name", ["tokenizer.json", None])
def test_a_tokenizer_that_may_not_be_read(folder, name, monkeypatch):
    """The folder is named where the error names no file."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", *([] if name is None else [str(folder / name)]))

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder if name is None else folder / name} cannot be read: ")
    assert "has no permission" in str(caught.value)
    assert "fetch its files again" not in str(caught.value)
