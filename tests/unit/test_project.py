"""What the field expects around a project: that it is there, and that it agrees with the rest."""

from __future__ import annotations

import configparser
import logging
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tox(section: str, key: str) -> list[str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return [line.strip() for line in parser[section][key].splitlines() if line.strip()]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_ci_runs_the_readme_s_second_command() -> None:
    """In an environment of its own: everything else is the same."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\.venv/bin/pip install (.*) && \.venv/bin/(.*)$", readme, re.MULTILINE)
    assert command == ("tox", "tox")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    install, prepare, run = script[-3:]
    # tox.ini asks for that version, too, and tox would install it by itself.
    assert re.fullmatch(r'\.tox/ci/bin/python -m pip install --quiet "(tox\S*)"', install)
    assert f'"{tox("tox", "requires")[0]}"' in install
    assert prepare.split("  #")[0] == f"{run} run-parallel --notest --parallel all", "it installs, and tests nothing"
    assert run == ".tox/ci/bin/python -m tox"
    assert not [line for line in script if re.search(r"(TOX_|TOXENV|\s-e\s)", line)], "all environments, as in tox.ini"


def test_tox_leaves_the_folder_of_the_readme_s_first_command_alone() -> None:
    assert tox("tox", "venv_redirect") == ["false"]


def test_every_environment_of_ci_is_what_contributing_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in [*tox("tox", "env_list")[0].split(", "), "nightly"]:
        assert re.search(rf"^\|.*`{name}`", text, re.MULTILINE), name


def test_checks_before_a_commit_are_those_of_lint() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "the project's own versions"
    hooks = [hook["entry"].removeprefix("python -m ").removesuffix(" --force-exclude") for hook in repository["hooks"]]
    lint = [re.sub(r" (--check|\.)(?= |$)", "", command) for command in tox("lint", "commands")]
    assert hooks == lint


def test_what_one_environment_leaves_out_another_one_runs() -> None:
    lanes = set(tox("tox", "env_list")[0].split(", "))
    left_out = {lane: " ".join(tox("elsewhere", lane)).replace("--ignore=", "").split() for lane in lanes}
    commands = tox("testenv", "commands")
    for lane in lanes:
        # What is slow_in_ci runs where torch_npu is, or in the newer of the two environments without.
        marked = '"not slow"' if lane == "transformers437" else '"not slow or slow_in_ci"'
        assert f"{lane}: pytest -m {marked} -n 2 {{posargs:{{[elsewhere]{lane}}}}}" in commands
    for path in {path for paths in left_out.values() for path in paths}:
        assert (ROOT / path).exists(), path
        assert any(path not in paths for paths in left_out.values()), f"no environment runs {path}"
    # On the emulated NPU all is run that takes the device under test, and with 4.37.0 all that asks for the version.
    for file, text in texts(left_out["emulated"]):
        tests = re.findall(r"^def (test_\w+)\(([^)]*)\)", text, re.MULTILINE)
        assert tests, file
        assert not [name for name, takes in tests if re.search(r"\bdevice\b", takes)], file
    for file, text in texts(left_out["transformers437"]):
        assert not re.search(r"^(?!from |@pytest\.mark\.skipif).*\b(IS_)?V4\b", text, re.MULTILINE), file


def texts(paths: list[str]) -> Iterator[tuple[Path, str]]:
    """The test files at and below ``paths``, and what they hold."""
    for path in paths:
        for file in sorted((ROOT / path).rglob("test_*.py")) or [ROOT / path]:
            yield file, file.read_text(encoding="utf-8")


def test_lint_is_part_of_every_run_of_tox() -> None:
    lanes = [
        name
        for name in tox("tox", "env_list")[0].split(", ")
        if f"{name}: {{[lint]commands}}" in tox("testenv", "commands")
    ]
    assert lanes == ["transformers5"]
    for section in ("testenv", "testenv:lint"):
        assert [line for line in tox(section, "deps") if line.endswith("{[lint]deps}")]
    assert tox("testenv:lint", "commands") == ["{[lint]commands}"]


def test_one_version_of_each_tool_everywhere() -> None:
    test = pyproject()["project"]["optional-dependencies"]["test"]
    pins = {pin for pin in tox("lint", "deps") if pin.startswith(("ruff", "mypy"))}
    assert pins == {pin for pin in test if pin.startswith(("ruff", "mypy"))}
    assert all("==" in pin for pin in pins)


def test_slow_tests_of_ci_are_slow_tests() -> None:
    """tox runs them by their own marker; the fast lane leaves them out by the other one."""
    marked = 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        both = len(re.findall(r"pytest\.mark\.slow(?:\n@|, )pytest\.mark\.slow_in_ci\b", text))
        assert both == len(re.findall(r"pytest\.mark\.slow_in_ci\b", text)), f"{path}: slow_in_ci without slow"
        marked += both
    assert marked


def test_types_are_for_users_too() -> None:
    assert (ROOT / "qwen2_npu" / "py.typed").exists()
    assert "py.typed" in pyproject()["tool"]["setuptools"]["package-data"]["qwen2_npu"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_asks_for_the_doctor_s_archive(name: str) -> None:
    form = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    for part in form["body"]:
        assert part["type"] in ("textarea", "dropdown", "input", "markdown")
        assert part["attributes"]["label"]
    assert "`qwen2-npu doctor --bundle bundle.zip`" in str(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_logs_can_be_tested(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("qwen2_npu.somewhere").warning("seen")
    assert caplog.messages == ["seen"]


def test_pre_commit_s_file_is_what_git_would_commit() -> None:
    """A file that .gitignore hides would be missing for everybody else."""
    names = [".pre-commit-config.yaml", "CONTRIBUTING.md", "CHANGELOG.md", "qwen2_npu/py.typed", "examples/generate.py"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    hidden = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert hidden.stdout == ""
