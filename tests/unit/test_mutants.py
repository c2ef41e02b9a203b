"""scripts/mutants.py: which faults it makes, that it tells those that a test notices, and what it leaves alone."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
TABLE = SCRIPTS / "mutants.toml"


@pytest.fixture(scope="module")
def finder() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import mutations
    finally:
        sys.path.remove(str(SCRIPTS))
    return mutations


def names(finder: ModuleType, source: str) -> list[str]:
    return [mutation.name for mutation in finder.mutations(source.encode())]


SHAPES = """
import functools


def decorated(limit: int) -> None:
    @functools.cache
    def inner(value: int) -> bool:
        return value > limit

    if limit < 0: return None
    elif limit == 1: raise ValueError(limit)
    else: limit += 1
    for value in (1, 2): print(value, (
        limit, value,
    ))
    try:
        return [limit, 2][0] if limit else None
    except (KeyError, ValueError): pass


class Limits:
    kept = {"a": 1, **{"b": 2}}
    first, *rest = 1, 2, 3
"""


def test_a_mutation_is_python_as_the_whole_file_would_be(finder: ModuleType) -> None:
    """It is looked at in its statement alone, whose lines may begin with else, or with what a decorator belongs to."""
    source = SHAPES.encode()
    expected = set()
    for mutation in finder.Finder(source).walk(ast.parse(source)):
        with contextlib.suppress(SyntaxError):
            ast.parse(mutation.apply(source))
            expected.add((mutation.start, mutation.end, mutation.new))
    found = {(mutation.start, mutation.end, mutation.new) for mutation in finder.mutations(source)}
    assert found == expected
    assert len(found) > 30


# ---- the faults ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", ["< -> <=", "< -> >="]),
        ("a != b", ["!= -> ==", "!= -> <", "!= -> >"]),
        ("a != 'x'", ["!= -> =="]),
        ("a is not None", ["is not -> is"]),
        ("a not in b", ["not in -> in"]),
        ("(é) <= (b)", ["<= -> <", "<= -> >"]),  # columns count bytes
        ("a and b", ["a and b -> (a) or (b)", "a and b -> (b)", "a and b -> (a)"]),
        ("not a", ["not a -> (a)"]),
        ("a - b", ["- -> +"]),
        ("x = 5", ["5 -> (5 * 10)"]),
        ("x = 0", ["0 -> 1"]),
        ("x = True", ["True -> False"]),
        ("any(a)", ["any -> all", "any(a) -> pass"]),
        ("x = min(a)", ["min -> max"]),
        ("x = [a, b]", ["a, -> nothing", ", b -> nothing"]),
        ("x = (a, b)", ["a, -> nothing", ", b -> ,"]),
        ("x = {a: b, c: d}", ["a: b, -> nothing", ", c: d -> nothing"]),
        ("x = [a for a in b if c]", ["b -> list(b)[:1]", "c -> (not (c))", "c -> True"]),
        ("for a in b:\n    a.c()", ["b -> list(b)[:1]", "a.c() -> pass"]),
        ("if a:\n    raise b", ["a -> (not (a))", "raise b -> pass"]),
        ("x = a if b else c", ["b -> (not (b))"]),
        ('WORDS = """one two three"""', ["one -> nothing", "three -> nothing", "two -> nothing"]),
    ],
)
def test_each_kind_of_fault(finder: ModuleType, source: str, expected: list[str]) -> None:
    assert sorted(names(finder, source)) == sorted(f"module: {name}" for name in expected)


@pytest.mark.parametrize(
    ("annotation", "body", "answers"),
    [
        ("bool", "return a", ["return True", "return False"]),
        ("list[str]", "return a", ["return []"]),
        ("str", "return a", ['return ""']),
        ("Iterator[str]", "yield a", ["return"]),
        ("None", "a()", ["return None"]),
        ("int | None", "return a", ["return None"]),
        ("int", "return a", []),
    ],
)
def test_a_function_that_answers_at_once(finder: ModuleType, annotation: str, body: str, answers: list[str]) -> None:
    source = f"class A:\n    def f(a) -> {annotation}:\n        '''Words.'''\n        {body}\n"
    found = [mutation for mutation in finder.mutations(source.encode()) if mutation.new.startswith("return")]
    assert [mutation.new.splitlines()[0].strip() for mutation in found] == answers
    assert {mutation.where for mutation in found} <= {"A.f"}


@pytest.mark.parametrize(
    "source",
    [
        "'''Words: a < b.'''",
        "x = f'{a < b}'",
        "def f(a: 1 < 2) -> 3:\n    'Words.'",
        "x: tuple[1, 2]",
        "import a, b",
        "if TYPE_CHECKING:\n    import a",
        "class A:\n    def __str__(self) -> str:\n        return 1 < 2",
        "zip(a, b, strict=True).c",
    ],
)
def test_words_and_types_are_left_alone(finder: ModuleType, source: str) -> None:
    assert names(finder, source) == []


def test_faults_of_one_name_are_numbered_and_each_changes_its_own_place(finder: ModuleType) -> None:
    source = b"def f(a, b):\n    x = a < b\n    return a < b\n"
    found = [mutation for mutation in finder.mutations(source) if mutation.new == "<="]
    assert [mutation.name for mutation in found] == ["f: < -> <=", "f: < -> <= (number 2)"]
    assert [mutation.line for mutation in found] == [2, 3]
    assert found[1].apply(source) == b"def f(a, b):\n    x = a < b\n    return a <= b\n"


def test_every_fault_of_every_judge_is_a_program_and_changes_one_place(finder: ModuleType) -> None:
    source = (ROOT / "qwen2_npu/conformance/perf/gate.py").read_bytes()
    found = finder.mutations(source)
    assert len(found) > 100
    assert len({mutation.name for mutation in found}) == len(found)
    for mutation in found:
        changed = mutation.apply(source)
        ast.parse(changed)
        assert changed[: mutation.start] == source[: mutation.start]
        assert changed.endswith(source[mutation.end :])
        assert changed != source


# ---- the table -------------------------------------------------------------------------------------------------------
def table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def test_the_table_names_files_that_there_are() -> None:
    assert {"qwen2_npu/conformance/accuracy/compare.py", "tests/graph/invariants.py"} < set(table())
    for path, judge in table().items():
        assert (ROOT / path).exists()
        assert judge.keys() <= {"tests", "equal"}, path
        assert all((ROOT / test).exists() for test in judge["tests"]), path


def test_the_page_has_every_judge_and_nothing_unexplained() -> None:
    text = (ROOT / "docs" / "power.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]*)` \| (\d+(?: \| \d+){3}) \|$", text, re.MULTILINE))
    assert rows.keys() == table().keys()
    for path, row in rows.items():
        mutants, noticed, equal, survived = map(int, row.split(" | "))
        assert (noticed + equal, survived) == (mutants, 0), path
        assert equal == len(table()[path].get("equal", {})), path


def test_the_table_names_faults_that_there_are(finder: ModuleType) -> None:
    for path, judge in table().items():
        there = {mutation.name for mutation in finder.mutations((ROOT / path).read_bytes())}
        assert judge.get("equal", {}).keys() <= there, path
        assert all(reason.strip() for reason in judge.get("equal", {}).values()), path


# ---- a whole run -----------------------------------------------------------------------------------------------------
RULES = "def allowed(value, limit):\n    return value <= limit\n"
WEAK = "from tests.rules import allowed\n\n\ndef test_rule():\n    assert allowed(1, 2)\n    assert not allowed(3, 2)\n"
STRONG = f"{WEAK}    assert allowed(2, 2)\n"
LEFT = "allowed: <= -> <"


class Project:
    """A repository with one judge, one test file and the scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        for name in ("mutants.py", "mutations.py", "judges.py", "library.py", "lane.py", "reached.py"):
            shutil.copy(SCRIPTS / name, folder / "scripts")
        self.write("tests/__init__.py", "")
        self.write("tests/rules.py", RULES)
        self.write("tests/test_rules.py", WEAK)
        self.table()
        self.git("init", "--quiet")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def table(self, **equal: str) -> None:
        lines = ['["tests/rules.py"]', 'tests = ["tests/test_rules.py"]', "equal = {" + ", ".join(
            f"{json.dumps(name)} = {json.dumps(reason)}" for name, reason in equal.items()
        ) + "}"]  # fmt: skip
        self.write("scripts/mutants.toml", "\n".join(lines))

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(self.folder), *identity, *arguments], check=True, capture_output=True)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.folder / "scripts" / "mutants.py"), *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def outcomes(path: Path) -> dict[str, str]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {result["name"]: result["outcome"] for result in content["tests/rules.py"]["results"]}


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_a_fault_that_no_test_notices_is_named_and_one_that_a_test_notices_is_not(
    project: Project, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
    done = project.run("--json", str(tmp_path / "result.json"))
    assert done.returncode == 1, done.stderr
    assert outcomes(tmp_path / "result.json") == {LEFT: "survived", "allowed: <= -> >": "killed"}
    assert f"tests/rules.py:2: survived: {LEFT}" in done.stdout
    after = {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if "__pycache__" not in path.parts} == before


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_a_reason_is_asked_for_and_one_too_many_refused(project: Project, tmp_path: Path) -> None:
    project.table(**{LEFT: "nobody asks for the limit itself"})
    done = project.run("--json", str(tmp_path / "result.json"))
    assert (done.returncode, outcomes(tmp_path / "result.json")[LEFT]) == (0, "equal"), done.stdout
    project.write("tests/test_rules.py", STRONG)
    done = project.run()
    assert done.returncode == 1
    assert f"stale reason: {LEFT}" in done.stdout
    project.table()
    assert project.run().returncode == 0


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_what_survived_is_tried_again_and_what_was_noticed_is_taken_over(project: Project, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    project.run("--json", str(first))
    content = json.loads(first.read_text(encoding="utf-8"))
    for result in content["tests/rules.py"]["results"]:
        if result["outcome"] == "killed":
            result["outcome"] = "timeout"  # to tell it from one that is tried again
    first.write_text(json.dumps(content), encoding="utf-8")
    project.write("tests/test_rules.py", STRONG)
    project.run("--again", str(first), "--json", str(second))
    assert outcomes(second) == {LEFT: "killed", "allowed: <= -> >": "timeout"}


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_what_changed_is_judged_alone(project: Project) -> None:
    project.git("add", ".")
    project.git("commit", "--quiet", "-m", "first")
    assert project.run("--changed", "HEAD").stdout == ""
    project.write("tests/test_rules.py", STRONG)  # of a judge's tests, too
    assert "tests/rules.py: {'killed': 2}" in project.run("--changed", "HEAD").stdout
    assert project.run("--changed", "HEAD", "--only", "other").stdout == ""


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_tests_that_fail_by_themselves_judge_nothing(project: Project) -> None:
    project.write("tests/test_rules.py", WEAK.replace("allowed(1, 2)", "allowed(9, 2)"))
    done = project.run()
    assert done.returncode == 1
    assert "tests/rules.py: its tests do not pass without a mutant: 1" in done.stderr


@pytest.mark.slow
def test_a_fault_that_never_ends_is_noticed(project: Project, tmp_path: Path) -> None:
    rule = "def allowed(value, limit):\n    at = 0\n    while at < value:\n        at += 1\n    return at <= limit\n"
    project.write("tests/rules.py", rule)
    project.write("tests/test_rules.py", STRONG)
    project.run("--json", str(tmp_path / "result.json"), "--limit", "1")
    assert outcomes(tmp_path / "result.json")["allowed: at += 1 -> pass"] == "timeout"
