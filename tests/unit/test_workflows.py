"""The workflows, as far as they can be tested without GitHub: they parse, and they call what there is."""

from __future__ import annotations

import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen2_npu.cli import nightly

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

OF_A_STRANGER = re.compile(r"\$\{\{\s*(inputs|github\.(event|head_ref)|vars)\b")
"""Expressions that somebody else fills in: in a script they would be code."""


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def test_both_are_there() -> None:
    assert [path.name for path in FILES] == ["ci.yml", "nightly.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_workflow(path: Path) -> None:
    content = load(path)
    assert content["permissions"] == {"contents": "read"}
    assert "concurrency" in content
    assert content[True], "YAML reads the key `on` as true"
    for job in content["jobs"].values():
        assert job["timeout-minutes"] <= 720
    for step in steps(path):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
        else:
            assert not OF_A_STRANGER.search(step["run"]), "hand it over in env"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_report_is_kept_whatever_happens(path: Path) -> None:
    kept = [step for step in steps(path) if step.get("uses", "").startswith("actions/upload-artifact")]
    assert len(kept) == 1
    assert kept[0]["if"] == "always()"
    assert kept[0]["with"]["path"] == "report"
    assert kept[0]["with"]["if-no-files-found"] == "error"


def nightly_command(path: Path) -> list[str]:
    scripts = [step["run"] for step in steps(path) if "qwen2-npu nightly" in step.get("run", "")]
    assert len(scripts) == 1, "all logic is in one command"
    words = shlex.split(scripts[0].replace("\\\n", " "))
    return words[words.index("qwen2-npu") + 2 :]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nightly_is_called_with_options_that_it_has(path: Path) -> None:
    arguments = nightly_command(path)
    parsed = nightly.command.make_context("nightly", list(arguments)).params
    assert parsed["results"] == Path("report")
    assert parsed["quick"] is (path.name == "ci.yml")


def test_a_wrong_option_would_be_seen() -> None:
    from click import NoSuchOption

    with pytest.raises(NoSuchOption):
        nightly.command.make_context("nightly", ["--no-such-option"])


def test_tox_environments_exist() -> None:
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    wanted = [name.strip() for name in tox["tox"]["env_list"].split(",")]
    assert load(ROOT / ".github/workflows/ci.yml")["jobs"]["tox"]["strategy"]["matrix"]["env"] == wanted


def test_what_the_documentation_says_of_the_runner() -> None:
    labels = load(ROOT / ".github/workflows/nightly.yml")["jobs"]["nightly"]["runs-on"]
    text = (ROOT / "docs" / "nightly.md").read_text(encoding="utf-8")
    assert f"`{','.join(labels[2:])}`" in text
    for variable in re.findall(r"vars\.(\w+)", (ROOT / ".github/workflows/nightly.yml").read_text(encoding="utf-8")):
        assert f"`{variable}`" in text


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("ci.yml", {"changed": "origin/$BASE"}), ("nightly.yml", {"group": "library", "slice": "tonight"})],
)
def test_mutants_are_run_with_options_that_there_are(
    path: str, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants

    (job,) = [job for name, job in load(ROOT / ".github/workflows" / path)["jobs"].items() if name == "mutants"]
    (script,) = [step["run"] for step in job["steps"] if "-e mutants" in step.get("run", "")]
    given = vars(mutants.parse(shlex.split(script.partition(" -- ")[2])))
    assert wanted.items() <= given.items()
    history = job["steps"][0].get("with", {}).get("fetch-depth")
    assert (history == 0) is ("changed" in wanted), "a comparison needs the other branch"
