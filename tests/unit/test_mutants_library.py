"""scripts/mutants.py on the library: which tests are run against a fault, how it gets into them, what is said of it."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
NAMES = ("mutants", "mutations", "judges", "library", "lane", "reached", "power_page")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    import importlib

    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(SCRIPTS))


# ---- a fault in a living function -----------------------------------------------------------------------------------
SOURCE = textwrap.dedent(
    '''
    import functools

    LIMIT = 3

    class Base:
        def __init__(self):
            self.made = True

    class Rule(Base):
        """Words."""

        def __init__(self, limit=LIMIT):
            super().__init__()
            self.limit = limit

        @property
        def twice(self) -> bool:
            """Words."""
            return self.limit > 1

        @twice.setter
        def twice(self, value):
            self.limit = value + 1

        if LIMIT:
            def kept(self, values) -> list:
                return [value for value in values if value < self.limit]

    def keeping(function):
        @functools.wraps(function)
        def inner(value):
            return function(value) + 1
        return inner

    @keeping
    def plain(value):
        return value + LIMIT
    '''
).encode()


def faults(scripts: dict[str, ModuleType]) -> dict[str, Any]:
    return {mutation.name: mutation for mutation in scripts["mutations"].mutations(SOURCE)}


def put(scripts: dict[str, ModuleType], name: str) -> dict[str, Any]:
    """The module, imported without the fault; then the fault in its functions."""
    module: dict[str, Any] = {"__name__": "rules"}
    exec(compile(SOURCE, "/rules.py", "exec"), module)
    lane = scripts["lane"]
    functions = lane.living({"/rules.py"})
    alive = {id(f) for f in _functions(module)}
    for old, new in lane.changed_codes(SOURCE, faults(scripts)[name], "/rules.py"):
        for function in functions.get(lane.place(old), []):
            if id(function) in alive:
                function.__code__ = new
    return module


def _functions(module: dict[str, Any]) -> list[FunctionType]:
    plain = module["plain"]
    found = [plain, plain.__wrapped__, module["keeping"]]
    for kind in (module["Base"], module["Rule"]):
        for value in vars(kind).values():
            found += [value] if isinstance(value, FunctionType) else []
            found += [value.fget, value.fset] if isinstance(value, property) else []
    return found


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        ("plain: + -> -", lambda m: m["plain"](4), 8, 2),
        ("keeping.inner: + -> -", lambda m: m["plain"](4), 8, 6),  # a closure that is there already
        ("Rule.twice: > -> <=", lambda m: m["Rule"](5).twice, True, False),
        ("Rule.twice: + -> -", lambda m: _set(m["Rule"](5), 7).limit, 8, 6),
        ("Rule.twice:  -> return False", lambda m: m["Rule"](5).twice, True, False),
        ("Rule.kept: < -> >=", lambda m: m["Rule"](2).kept([1, 2]), [1], [2]),
        ("Rule.__init__: super().__init__() -> pass", lambda m: hasattr(m["Rule"](), "made"), True, False),
    ],
)
def test_a_fault_gets_into_functions_that_are_imported(
    scripts: dict[str, ModuleType], name: str, answer: Callable[[dict[str, Any]], Any], right: Any, wrong: Any
) -> None:
    name = next(found for found in faults(scripts) if found.replace("nothing", "").strip() == name or found == name)
    module: dict[str, Any] = {"__name__": "rules"}
    exec(compile(SOURCE, "/elsewhere.py", "exec"), module)
    assert answer(module) == right
    assert answer(put(scripts, name)) == wrong


def test_functions_are_found_whatever_was_frozen(scripts: dict[str, ModuleType]) -> None:
    lane = scripts["lane"]
    gc.freeze()
    try:
        assert lane.living({lane.__file__})[lane.place(lane.living.__code__)] == [lane.living]
    finally:
        gc.unfreeze()


def _set(rule: Any, value: int) -> Any:
    rule.twice = value
    return rule


def test_a_fault_outside_of_functions_takes_a_new_interpreter(scripts: dict[str, ModuleType]) -> None:
    lane, library = scripts["lane"], scripts["library"]
    for name, fault in faults(scripts).items():
        outside = name.startswith(("module:", "Rule: "))
        assert (lane.changed_codes(SOURCE, fault, "/rules.py") == []) is outside, name
        assert library.needs_import(SOURCE, fault, []) is outside, name
    assert any(name.startswith("module:") for name in faults(scripts))


def test_so_does_one_in_a_function_that_imports_call(scripts: dict[str, ModuleType]) -> None:
    lines = SOURCE.decode().splitlines()
    called = lines.index("    return value + LIMIT") + 1
    fault = faults(scripts)["plain: + -> -"]
    assert scripts["library"].needs_import(SOURCE, fault, [called])
    assert not scripts["library"].needs_import(SOURCE, fault, [called - 1])  # its first line is read by an import
    assert isinstance(scripts["lane"].changed_codes(SOURCE, fault, "/rules.py")[0][0], CodeType)


# ---- which tests ----------------------------------------------------------------------------------------------------
def test_the_lines_of_a_statement(scripts: dict[str, ModuleType]) -> None:
    source = b"def f(a):\n    if (a\n            < 1):\n        return [\n            2 + a,\n        ]\n    return a\n"
    found = {m.name: scripts["library"].lines_of(source, m) for m in scripts["mutations"].mutations(source)}
    assert found["f: < -> <="] == [2, 3]
    assert found["f: + -> -"] == [4, 5, 6]


PATH = "qwen2_npu/models/rules.py"
BODY = b"def f(a):\n    return a < 1\n\n\ndef g(a):\n    return a < 2\n"


def record(scripts: dict[str, ModuleType], **tests: tuple[float, list[int]]) -> Any:
    """Test id (with / for __) -> its seconds and the lines that it reaches."""
    names = [name.replace("__", "/") for name in tests]
    lines: dict[int, int] = {1: 0, 2: 0, 5: 0, 6: 0}
    for index, (_, reached) in enumerate(tests.values()):
        for line in reached:
            lines[line] |= 1 << index
    ids = [f"tests/{name.replace('/at/', '.py::test_')}" for name in names]
    return scripts["reached"].Record(
        ids, [seconds for seconds, _ in tests.values()], {PATH: lines}, {PATH: [1, 5]}, [], {}
    )


def test_near_and_short_tests_that_reach_the_line_come_first(scripts: dict[str, ModuleType]) -> None:
    found = record(
        scripts,
        accuracy__test_all__at__slow=(5.0, [2, 6]),
        accuracy__test_all__at__quick=(0.1, [2]),
        unit__models__test_other__at__a=(1.0, [2]),
        unit__models__test_other__at__elsewhere=(0.1, [6]),
        unit__models__test_rules__at__a=(2.0, [2]),
        unit__models__test_rules__at__elsewhere=(0.1, [6]),
        unit__test_nothing__at__a=(0.1, []),
    )
    fault = scripts["mutations"].mutations(BODY)[0]
    chosen = scripts["library"].chosen(PATH, BODY, fault, found, 100.0)
    assert [found.tests[index] for index in chosen] == [
        "tests/unit/models/test_rules.py::test_a",
        "tests/unit/models/test_other.py::test_a",
        "tests/accuracy/test_all.py::test_quick",
        "tests/accuracy/test_all.py::test_slow",
        # What a fixture or a cache keeps is built by the first of them alone.
        "tests/unit/models/test_rules.py::test_elsewhere",
        "tests/unit/models/test_other.py::test_elsewhere",
    ]
    short = scripts["library"].chosen(PATH, BODY, fault, found, 3.2)
    assert [found.tests[index].partition("::test_")[2] for index in short] == ["a", "a", "quick", "elsewhere"]


def test_what_no_test_reaches_is_tried_by_those_of_its_folder(scripts: dict[str, ModuleType]) -> None:
    found = record(
        scripts,
        accuracy__test_all__at__a=(0.1, [2]),
        unit__models__test_other__at__a=(0.2, []),
        unit__models__test_rules__at__a=(0.3, []),
    )
    table = "qwen2_npu/models/__init__.py"
    fault = scripts["mutations"].mutations(b"LIMIT = 3\n")[0]
    chosen = scripts["library"].chosen(table, b"LIMIT = 3\n", fault, found, 100.0)
    assert [found.files[index] for index in chosen] == [
        "tests/unit/models/test_other.py",
        "tests/unit/models/test_rules.py",
    ]


def test_one_of_a_function_comes_before_its_siblings(scripts: dict[str, ModuleType]) -> None:
    ids = ["a.py::t[1]", "a.py::t[2]", "b.py::t[1]", "b.py::t[2]"]
    found = scripts["reached"].Record(ids, [0.2, 0.1, 0.1, 0.2], {PATH: {2: 15}}, {PATH: []})
    chosen = scripts["library"].chosen(PATH, BODY, scripts["mutations"].mutations(BODY)[0], found, 9.0)
    assert [ids[index] for index in chosen] == ["a.py::t[2]", "b.py::t[1]", "a.py::t[1]", "b.py::t[2]"]
    near = "tests/unit/models/test_other.py::t"
    ids = ["a.py::t", f"{near}[1]", f"{near}[2]", f"{near}[3]"]  # quick ones of the same folder go with it
    found = scripts["reached"].Record(ids, [0.1, 0.01, 0.02, 0.06], {PATH: {2: 15}}, {PATH: []})
    chosen = scripts["library"].chosen(PATH, BODY, scripts["mutations"].mutations(BODY)[0], found, 9.0)
    assert [ids[index] for index in chosen] == [f"{near}[1]", f"{near}[2]", "a.py::t", f"{near}[3]"]


def test_every_fault_is_in_one_part_and_stays_there(scripts: dict[str, ModuleType]) -> None:
    mutations = scripts["mutations"]
    source = (ROOT / "qwen2_npu/cache.py").read_bytes()
    before = {m.name: mutations.part_of("c", m.name, 10) for m in mutations.mutations(source)}
    assert set(before.values()) == set(range(10))
    moved = {m.name: mutations.part_of("c", m.name, 10) for m in mutations.mutations(b"X = 3\n" + source)}
    assert before.items() <= moved.items()


def test_what_changed_comes_first(scripts: dict[str, ModuleType]) -> None:
    found = scripts["mutations"].mutations(BODY)
    assert {m.line for m in scripts["mutations"].in_order(PATH, found, {6})[:2]} == {6}


def test_a_record_is_kept(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    found = record(scripts, unit__test_a__at__a=(1.5, [2]), unit__test_b__at__b=(2.5, [2, 6]))
    found.save(tmp_path / "record.json.gz")
    again = scripts["reached"].Record.load(tmp_path / "record.json.gz")
    assert again == found
    assert again.reaching(PATH, [2]) == [0, 1]
    assert again.reaching(PATH, [6]) == [1]


# ---- the table and the page -----------------------------------------------------------------------------------------
def test_the_table_names_files_and_faults_that_there_are(scripts: dict[str, ModuleType]) -> None:
    table = scripts["library"].Library.load(ROOT)
    paths = table.paths(ROOT)
    for area in ("models/attention", "cache", "checkpoint/weights", "ops/attention/decode", "graph/npu"):
        assert f"qwen2_npu/{area}.py" in paths
    assert table.equal.keys() <= set(paths)
    for path, reasons in table.equal.items():
        there = {mutation.name for mutation in scripts["mutations"].mutations((ROOT / path).read_bytes())}
        assert reasons.keys() <= there, path
        assert all(reason.strip() for reason in reasons.values()), path
    assert set(tomllib.loads((SCRIPTS / "library.toml").read_text(encoding="utf-8"))) <= {"files", "equal"}


def test_the_interval_of_a_sample(scripts: dict[str, ModuleType]) -> None:
    low, high = scripts["power_page"].interval(95, 100)
    assert (round(low, 3), round(high, 3)) == (0.888, 0.978)  # Wilson's, of the literature
    assert scripts["power_page"].interval(10, 10)[1] == pytest.approx(1.0)


SWIGLU = "qwen2_npu/ops/swiglu.py"


def result(**outcomes: list[str]) -> dict[str, Any]:
    """Of one file of the library, as ``mutants.py`` writes it: outcome -> names."""
    results = [{"name": name, "outcome": outcome} for outcome, names in outcomes.items() for name in names]
    return {SWIGLU: {"group": "library", "budget": 30.0, "results": results}}


def test_the_page_keeps_what_no_result_speaks_of_and_what_was_noticed_at_first(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    power_page = scripts["power_page"]
    monkeypatch.setattr(power_page, "PACKAGES", ("pytest",))
    kept = json.loads((ROOT / "docs" / "power.json").read_text(encoding="utf-8")) | {"library": {}}
    judge = "qwen2_npu/conformance/perf/rows.py"
    kept["judges"] = {judge: kept["judges"][judge]}
    judges = json.dumps(kept["judges"])
    every = [mutation.name for mutation in scripts["mutations"].mutations((ROOT / SWIGLU).read_bytes())]
    a, b, c, d, e, f, *_ = every
    for given, row in (
        (result(killed=[a], left=[b]), [1, 1, 1, 0, 0]),
        (result(killed=[b], timeout=[c], survived=[d]), [4, 3, 3, 0, 1]),
        (result(killed=[a, d]), [4, 3, 4, 0, 0]),  # a test was added
        (result(killed=[d, e]), [5, 4, 5, 0, 0]),  # which makes it none that was noticed at first
        (result(survived=[a, f]), [6, 3, 4, 0, 2]),  # a test is gone
        (result(killed=["of a text that is another now"]), [6, 3, 4, 0, 2]),
    ):
        power_page.take(kept, given)
        assert json.dumps(kept["judges"]) == judges
        text = power_page.page(kept)
        assert f"| `{SWIGLU}` | {len(every)} | {' | '.join(map(str, row))} |" in text
    assert text.count(f"**A test is missing**: `{SWIGLU}:") == 2
    assert "**6 of them were tried**" in text
    low, _ = power_page.interval(3, 6)
    files, mutants = scripts["library"].Library.load(ROOT).paths(ROOT), 0
    for path in (path for path in files if path.startswith("qwen2_npu/ops/")):
        mutants += len(scripts["mutations"].mutations((ROOT / path).read_bytes()))
    share = 4 / 6 * 6 / mutants + low * (1 - 6 / mutants)
    assert f"| ops | {mutants} | 6 | 50.0% | {low:.1%} to " in text
    assert f"| 66.7% | 2 | {share:.1%} |" in text
    equal = power_page.count(SWIGLU, kept["library"][SWIGLU], {a: "a reason", e: "one that is not asked for"})
    assert power_page.counts(equal) == [6, 4, 1, 1]


def test_what_is_kept_is_read_as_it_was_written(scripts: dict[str, ModuleType]) -> None:
    text = (ROOT / "docs" / "power.json").read_text(encoding="utf-8")
    assert scripts["power_page"].written(json.loads(text)) == text


# ---- a whole run ----------------------------------------------------------------------------------------------------
RULES = """LIMIT = 3


def allowed(value):
    return value <= LIMIT


def counted(value):
    while value > 0:
        value -= 1
    return value


def unseen(value):
    return value + 1
"""
TESTS = """import subprocess
import sys

import pytest

from lib.rules import allowed, counted, unseen

STATE = []


def test_rule():
    assert allowed(1)
    assert not allowed(5)


def test_counted():
    assert counted(2) == 0


def test_state():
    STATE.append(unseen(1))


def test_that_fails_where_another_went_before():
    if unseen(1) and STATE:
        pytest.fail()
"""
IN_A_PROCESS = """import subprocess
import sys


def test_in_a_process():
    subprocess.run([sys.executable, "-c", "from lib.rules import unseen; assert unseen(1) == 2"], check=True)
"""

DIES_IN_A_FORK = """import os

from lib.rules import unseen

HERE = os.getpid()


def test_that_ends_a_fork():
    value = unseen(1)
    if os.getpid() != HERE:
        os.abort()
    assert value < 3
"""


class Project:
    """A repository with a library of one file, its tests and the scripts."""

    def __init__(self, folder: Path, *table: str) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        for name in NAMES:
            shutil.copy(SCRIPTS / f"{name}.py", folder / "scripts")
        self.write("scripts/mutants.toml", "")
        self.write("scripts/library.toml", "\n".join(['files = ["lib/*.py"]', *table]))
        self.write("lib/__init__.py", "")
        self.write("lib/rules.py", RULES)
        self.write("tests/test_rules.py", TESTS)
        self.write("pytest.ini", "[pytest]\nmarkers = slow\n")
        self.git("init", "--quiet")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(self.folder), *identity, *arguments], check=True, capture_output=True)

    def run(self, *arguments: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
        """Status, output, and name -> result."""
        pytest.importorskip("coverage", "7.10", reason="the mutation run needs coverage: pip install coverage")
        result = self.folder.parent / "result.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, str(self.folder / "scripts" / "mutants.py"), "--json", str(result), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        content = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        results = content.get("lib/rules.py", {}).get("results", [])
        return done.returncode, done.stdout, {each["name"]: each for each in results}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.mark.slow
def test_what_a_test_notices_and_what_none_does(project: Project, tmp_path: Path) -> None:
    project.write("tests/test_process.py", IN_A_PROCESS)
    before = {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
    status, out, found = project.run("--slices", "1", "--record", str(tmp_path / "record.json.gz"))
    outcomes = {name: each["outcome"] for name, each in found.items()}
    assert outcomes["allowed: <= -> >"] == "killed"
    assert found["allowed: <= -> >"]["by"] == "tests/test_rules.py::test_rule"
    assert outcomes["allowed: <= -> <"] == "survived"  # nobody asks for the limit itself
    assert outcomes["module: 3 -> (3 * 10)"] == "killed"  # a constant, in a new interpreter
    assert found["unseen: + -> -"]["by"] == "tests/test_process.py::test_in_a_process"
    assert "lib/rules.py:5: survived: allowed: <= -> <" in out
    assert status == 1
    after = {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if "__pycache__" not in path.parts} == before
    first = tmp_path / "first.json"
    first.write_text((tmp_path / "result.json").read_text(encoding="utf-8"), encoding="utf-8")
    given = ("--slices", "1", "--record", str(tmp_path / "record.json.gz"), "--again", str(first))
    assert project.run(*given, "--at-least", "10")[0] == 0


@pytest.mark.slow
def test_a_test_that_others_make_fail_notices_nothing(project: Project, scripts: dict[str, ModuleType]) -> None:
    fault, slices = "unseen: + -> -", 12
    _, _, found = project.run(
        "--slices", str(slices), "--slice", str(scripts["mutations"].part_of("lib/rules.py", fault, slices))
    )
    assert found[fault]["outcome"] == "survived"


@pytest.mark.slow
def test_a_fork_that_dies_says_nothing(project: Project) -> None:
    project.write("tests/test_rules.py", DIES_IN_A_FORK)
    _, _, found = project.run("--slices", "1")
    assert found["unseen: + -> -"]["outcome"] == "survived"
    assert found["unseen: 1 -> (1 * 10)"]["outcome"] == "killed"


@pytest.mark.slow
def test_a_fault_that_never_ends_is_noticed_and_a_reason_counts(tmp_path: Path) -> None:
    reasons = ['[equal."lib/rules.py"]', '"allowed: <= -> <" = "nobody asks"', '"allowed: <= -> >" = "wrong"']
    project = Project(tmp_path / "project", *reasons)
    script = project.folder / "scripts" / "lane.py"
    script.write_text(script.read_text(encoding="utf-8").replace("PATIENCE = 20.0", "PATIENCE = 1.0"), encoding="utf-8")
    status, out, found = project.run("--slices", "1")
    assert found["counted: value -= 1 -> pass"]["outcome"] == "timeout"
    assert (found["allowed: <= -> <"]["outcome"], found["allowed: <= -> <"]["reason"]) == ("equal", "nobody asks")
    assert "stale reason: allowed: <= -> >" in out
    assert status == 1


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_slices_are_parts_and_none_is_tried_without_time(
    project: Project, tmp_path: Path, scripts: dict[str, ModuleType]
) -> None:
    mutations = scripts["mutations"]
    given = ("--record", str(tmp_path / "record.json.gz"), "--minutes", "0", "--slices")
    parts = [project.run(*given, "2", "--slice", part)[2] for part in "01"]
    everything = project.run(*given, "1")
    assert parts[0].keys() | parts[1].keys() == everything[2].keys()
    assert not parts[0].keys() & parts[1].keys()
    assert {each["outcome"] for each in everything[2].values()} == {"left"}
    assert everything[0] == 0
    first, second, *others = everything[2]
    noticed, missed = (mutations.key_of("lib/rules.py", name) for name in (first, second))
    project.write(
        "docs/power.json", json.dumps({"library": {"lib/rules.py": {"noticed": [noticed], "missed": [missed]}}})
    )
    assert list(project.run(*given, "1", "--pick", "untried")[2]) == others
    assert list(project.run(*given, "1", "--pick", "missed")[2]) == [second]


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_lines_that_changed_are_tried_by_tests_nearby(project: Project) -> None:
    project.git("add", ".")
    project.git("commit", "--quiet", "-m", "first")
    assert project.run("--changed", "HEAD")[1] == ""
    project.write("lib/rules.py", RULES.replace("value + 1", "value + 2"))
    test = "import lib.rules\n\n\ndef test_it():\n    assert lib.rules.unseen(1) == 3\n"
    project.write("tests/unit/test_rules.py", test)
    status, _, found = project.run("--changed", "HEAD")
    assert {name.partition(":")[0] for name in found} == {"unseen"}
    assert {each["outcome"] for each in found.values()} == {"killed"}
    assert status == 0
