"""The Markdown files: both READMEs say the same, lines are short, links lead somewhere, commands are what there is."""

from __future__ import annotations

import re
import shlex
import tomllib
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PROJECT = sorted(ROOT.glob("*.md"))
PAGES = [*PROJECT, *sorted((ROOT / "docs").glob("*.md"))]
COLUMNS = 120
OPTIONS_WITH_WORDS = {"--prompt", "--update-baselines", "--update-graphs"}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def columns(text: str) -> int:
    """On a terminal, where Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


def long_lines(text: str) -> list[str]:
    """Lines of prose with too many columns; tables and code need what they need."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in prose.splitlines() if columns(line) > COLUMNS and not line.startswith("|")]


def commands(text: str) -> list[list[str]]:
    """The shell commands of all code blocks as words: without comments, placeholders and what a person would say."""
    found = []
    for line in "".join(blocks(text, "bash")).splitlines():
        words = shlex.split(re.sub(r"<[^>]*>", "PLACEHOLDER", line), comments=True)
        texts = [before in OPTIONS_WITH_WORDS for before in ["", *words]]
        if words:
            found.append(["TEXT" if text else word for word, text in zip(words, texts, strict=False)])
    return found


def scripts(text: str) -> list[str]:
    """Python code without comments and without what a person would say."""
    return [
        re.sub(r" *#.*", "", re.sub(r'tokenizer\("[^"]*"', "tokenizer(TEXT", code)) for code in blocks(text, "python")
    ]


def code_of(cell: str) -> list[str]:
    """What is the same in every language: code, numbers of versions, where links lead to."""
    named = re.sub(r"=(REASON|理由)`", "=REASON`", cell)
    return sorted(re.findall(r"`[^`]*`|\]\([^)]*\)|\d+(?:\.\d+)+(?:\+\w+)?", named))


def tables(text: str) -> list[list[list[list[str]]]]:
    """Tables as rows of cells, of each cell the code."""
    found: list[list[list[list[str]]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([code_of(cell) for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
        inside = line.startswith("|")
    return found


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", read(page))}
    assert "test_the_error_of_each_position_counts_up_to_its_limit" in named
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in (path.stem, *re.findall(r"^(?:async )?def (test_\w+)\(", read(path), re.MULTILINE))
    }
    assert not named - there


def test_every_judge_of_accuracy_has_a_control_in_the_table_of_rules() -> None:
    """The files that scripts/mutants.py weakens."""
    table = read(ROOT / "docs" / "accuracy.md").split("### The control of each rule")[1].split("\n### ")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    judges = tomllib.loads(read(ROOT / "scripts" / "mutants.toml"))
    without = [
        judge
        for judge, entry in judges.items()
        if judge.startswith("qwen2_npu/conformance/accuracy/")
        and not any(named & set(re.findall(r"^def (test_\w+)\(", read(ROOT / path), re.M)) for path in entry["tests"])
    ]
    assert len(judges) > 10
    assert not without


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (commands(read(path)) for path in READMES)
    assert len(english) > 8
    assert english == chinese


def test_both_readmes_have_the_same_scripts_and_output() -> None:
    english, chinese = (read(path) for path in READMES)
    assert scripts(english)
    assert scripts(english) == scripts(chinese)
    assert blocks(english, "text")
    assert blocks(english, "text") == blocks(chinese, "text")


def test_both_readmes_have_the_same_tables_and_sections() -> None:
    english, chinese = (read(path) for path in READMES)
    assert len(tables(english)) == 5
    for one, other in zip(tables(english), tables(chinese), strict=True):
        assert one == other
    levels = [
        re.findall(r"^#+(?= )", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        for text in (english, chinese)
    ]
    assert levels[0] == levels[1]


@pytest.mark.parametrize(
    ("change", "reader"),
    [
        (("qwen2-npu doctor ", "qwen2-npu doctor --bundle x "), commands),
        (('device="npu:0"', 'device="cpu"'), scripts),
        (("| `swiglu` |", "| `swish` |"), tables),
        (("| Python | 3.11 |", "| Python | 3.11 | |"), tables),
        (("4.37.0 on the CPU", "4.38.0 on the CPU"), tables),
    ],
    ids=["command", "script", "code in a cell", "cell", "version"],
)
def test_a_difference_would_be_seen(change: tuple[str, str], reader: object) -> None:
    text = read(READMES[0])
    assert change[0] in text
    assert callable(reader)
    assert reader(text) != reader(text.replace(*change))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_prose_has_short_lines(path: Path) -> None:
    assert not long_lines(read(path))


def test_a_long_line_would_be_seen() -> None:
    assert long_lines("x" * 121) == ["x" * 121]
    assert long_lines("图" * 61)
    assert not long_lines("| " + "x" * 121 + "\n```\n" + "x" * 121 + "\n```\n" + "图" * 60)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_first_screen_says_what_it_is_how_to_start_and_how_to_use_it() -> None:
    for path in READMES:
        lines = read(path).splitlines()
        first_table = next(number for number, line in enumerate(lines) if line.startswith("|") or "```text" in line)
        assert next(n for n, line in enumerate(lines) if line == "```python") < 35
        sections = [number for number, line in enumerate(lines) if line.startswith("## ")]
        use = [number for number, line in enumerate(lines) if line.startswith("qwen2-npu ") and number < sections[1]]
        assert len(use) >= 6
        assert first_table > max(use)


FILES_NAMED = re.compile(r"`((?:qwen2_npu|tests|docs|baselines|scripts|examples)/[\w./-]*)`")


@pytest.mark.parametrize("path", PROJECT, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in FILES_NAMED.findall(read(path)):
        # X stands for the reader's own operator.
        assert (ROOT / name).exists() or name.endswith("/X.py"), name
