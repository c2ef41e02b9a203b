"""Runs chosen tests against faults in the library, each in a process forked from one that has collected every test.

A fault within a function replaces the code of the living function in the fork: nothing is imported again. Any other
(a constant, a default, a class's field, what runs while modules are imported) gets a new interpreter. The file is
changed on disk, too, for the processes that tests start.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
from mutations import Mutation, mutations, parsed
from reached import FAST_LANE, Record

OPTIONS = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=native"]
SLOWER = 10
"""A test that takes that many times its recorded seconds, and PATIENCE more, never ends."""
PATIENCE = 20.0

FEW = 3
"""Files whose tests a new interpreter collects first."""


class Ran(NamedTuple):
    """What a process said of its tests: ``passed``, or ``failed``, ``timeout`` or ``died`` with the test at its end."""

    outcome: str
    test: str = ""


# ---- a fault in a living function -----------------------------------------------------------------------------------
def outer_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions and methods that exist once the module is imported, in the order of their text."""
    found: list[ast.FunctionDef] = []

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                found.append(child)
            elif not isinstance(child, ast.Lambda):
                walk(child)

    walk(tree)
    return found


def outer_codes(module: CodeType) -> list[CodeType]:
    """The same, as they are compiled."""
    found: list[CodeType] = []
    for constant in module.co_consts:
        if isinstance(constant, CodeType) and not constant.co_name.startswith("<"):
            # A class's code has no fast locals of its own; a function's has.
            found += [constant] if constant.co_flags & 0x2 else outer_codes(constant)
    return found


def index_of(source: bytes, mutation: Mutation) -> int | None:
    """Which of the outer functions has the fault in its body; None: none of them."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for index, function in enumerate(outer_functions(parsed(source))):
        begin = starts[function.body[0].lineno - 1] + function.body[0].col_offset
        end = starts[function.end_lineno - 1] + function.end_col_offset  # type: ignore[operator]
        if begin <= mutation.start and mutation.end <= end:
            return index
    return None


def changed_codes(source: bytes, mutation: Mutation, file: str) -> list[tuple[CodeType, CodeType]]:
    """Codes of the function with the fault and of those within, before and after; none where no function has it."""
    index = index_of(source, mutation)
    if index is None:
        return []
    changed = mutation.apply(source)
    before = outer_codes(compile(source, file, "exec", dont_inherit=True))
    after = outer_codes(compile(changed, file, "exec", dont_inherit=True))
    assert len(before) == len(after), mutation
    old, new = before[index], after[index]
    missing = set(old.co_freevars) - set(new.co_freevars)
    if missing:  # super() was left out, and with it the cell of the class: named where it is never read
        body = outer_functions(ast.parse(changed))[index].body[0]
        lines = changed.splitlines(keepends=True)
        lines.insert(body.lineno - 1, b" " * body.col_offset + b"if 0: " + ", ".join(sorted(missing)).encode() + b"\n")
        new = outer_codes(compile(b"".join(lines), file, "exec", dont_inherit=True))[index]
    return list(pairs(old, new))


def pairs(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    yield old, new
    before, after = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new))
    if [code.co_name for code in before] == [code.co_name for code in after]:
        for inner in zip(before, after, strict=True):
            yield from pairs(*inner)


def place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def living(files: set[str]) -> dict[tuple[str, str, int], list[FunctionType]]:
    """Every function of the files."""
    found = defaultdict(list)
    gc.unfreeze()  # what a test froze when it was imported is not listed
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename in files:
            found[place(thing.__code__)].append(thing)
    return found


# ---- tests in a process of their own --------------------------------------------------------------------------------
def run_items(items: Sequence[pytest.Item], out: int) -> None:
    """Runs them up to the first that fails, and says so on the way."""
    for index, item in enumerate(items):
        os.write(out, f"start {index}\n".encode())
        following = items[index + 1] if index + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            os.write(out, f"failed {index}\n".encode())
            return
    os.write(out, b"passed\n")


def follow(pid: int, read: int, tests: Sequence[str], limits: Sequence[float], starting: float) -> Ran:
    """Waits for such a process, ends it and what it left behind."""
    text, current, ends = b"", -1, time.monotonic() + starting
    ran: Ran | None = None
    while ran is None:
        ready, _, _ = select.select([read], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            ran = Ran("timeout", tests[max(current, 0)])
            break
        piece = os.read(read, 65536)
        *lines, text = (text + piece).split(b"\n")
        for line in lines:
            word, _, number = line.decode().partition(" ")
            if word == "start":
                current = int(number)
                ends = time.monotonic() + limits[current]
            else:
                ran = Ran(word, tests[int(number)] if number else "")
        if not piece and ran is None:  # it died, or its imports failed
            ran = Ran("died", tests[current] if current >= 0 else "import")
    os.close(read)
    for end in (os.killpg, os.kill):
        try:
            end(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.waitpid(pid, 0)
    return ran


def limits_of(seconds: Sequence[float]) -> list[float]:
    return [SLOWER * each + PATIENCE for each in seconds]


@dataclass(frozen=True)
class Work:
    """One fault to try.

    Attributes:
        tests: indexes of the record, in the order to run them.
        imported: whether it acts while modules are imported, too: then what a living function does is not all.
    """

    path: str
    name: str
    tests: list[int]
    imported: bool


class Lane:
    """The plugin of the process that has collected every test."""

    def __init__(self, record: Record, work: Sequence[Work], say: Callable[[dict[str, Any]], None]) -> None:
        self.record, self.work, self.say = record, work, say
        self.alone: dict[str, bool] = {}
        self.functions: dict[tuple[str, str, int], list[FunctionType]] = {}
        self.items: dict[str, pytest.Item] = {}
        self.fresh_works = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for name in self.record.modules:  # what tests import on their way; not for every fault again
            if name not in sys.modules:
                try:
                    importlib.import_module(name)
                except Exception:
                    continue
        self.items = {item.nodeid: item for item in session.items}
        files = {Path(work.path).resolve() for work in self.work if work.tests}
        self.functions = living(set(map(str, files)))
        assert self.functions or not any(outer_functions(ast.parse(file.read_bytes())) for file in files), files

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool:
        gc.freeze()
        files: dict[str, tuple[bytes, dict[str, Mutation]]] = {}
        for work in self.work:
            file = Path(work.path).resolve()
            if work.path not in files:
                text = file.read_bytes()
                files[work.path] = text, {mutation.name: mutation for mutation in mutations(text)}
                for cached in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
                    cached.unlink()
            source, known = files[work.path]
            started = time.monotonic()
            try:
                ran = self.one(file, source, known[work.name], work)
            finally:
                file.write_bytes(source)
            self.say(
                {"path": work.path, "name": work.name, "line": known[work.name].line, "outcome": ran.outcome}
                | {"by": ran.test, "seconds": round(time.monotonic() - started, 2)}
            )
        return True

    def one(self, file: Path, source: bytes, mutation: Mutation, work: Work) -> Ran:
        """In a fork where that will do, and in new interpreters where that notices nothing and may not be all."""
        tests = [self.record.tests[index] for index in work.tests if self.record.tests[index] in self.items]
        swap = self.swap(file, source, mutation)
        ran = Ran("passed") if swap is None else self.tried(file, source, mutation, tests, swap)
        if ran.outcome != "passed" or not tests or not (work.imported or swap is None):
            return ran
        if not self.fresh_works:
            self.fresh_works = any(interpreted([test], [PATIENCE]).outcome == "passed" for test in tests[:FEW])
            assert self.fresh_works, f"a new interpreter does not run {tests[:FEW]}"
        return self.tried(file, source, mutation, tests, None)

    def tried(
        self, file: Path, source: bytes, mutation: Mutation, tests: list[str], swap: Callable[[], None] | None
    ) -> Ran:
        """Until no test notices, or one notices that passes without the fault."""
        seconds = dict(zip(self.record.tests, self.record.seconds, strict=True))
        while tests:
            limits = limits_of([seconds[test] for test in tests])
            file.write_bytes(mutation.apply(source))
            ran = self.forked(tests, limits, swap) if swap else self.fresh(tests, limits)
            file.write_bytes(source)
            if ran.outcome == "passed" or ran.test == "import":
                return ran
            at = tests.index(ran.test)
            if self.passes_alone(ran.test, limits[at]) and self.confirmed(
                file, mutation.apply(source), source, tests[: at + 1], limits[: at + 1], swap
            ):
                return ran
            tests = tests[at + 1 :]
        return Ran("passed")

    def confirmed(
        self,
        file: Path,
        changed: bytes,
        source: bytes,
        tests: Sequence[str],
        limits: Sequence[float],
        swap: Callable[[], None] | None,
    ) -> bool:
        """Whether it was the fault that made the last of the tests fail, and not those before it."""
        if len(tests) == 1:
            return True
        if swap is None:
            return self.forked(tests, limits, None).outcome == "passed"
        file.write_bytes(changed)
        ran = self.forked(tests[-1:], limits[-1:], swap)
        file.write_bytes(source)
        return ran.outcome != "passed"

    def passes_alone(self, test: str, limit: float) -> bool:
        if test not in self.alone:
            self.alone[test] = self.forked([test], [limit], None).outcome == "passed"
        return self.alone[test]

    def swap(self, file: Path, source: bytes, mutation: Mutation) -> Callable[[], None] | None:
        """What puts the fault into this process; None where that takes an import."""
        swaps = [
            (function, new)
            for old, new in changed_codes(source, mutation, str(file))
            for function in self.functions.get(place(old), [])
        ]
        if not swaps or any(function.__code__.co_freevars != new.co_freevars for function, new in swaps):
            return None

        def put() -> None:
            for function, new in swaps:
                function.__code__ = new

        return put

    def forked(self, tests: Sequence[str], limits: Sequence[float], swap: Callable[[], None] | None) -> Ran:
        """In forks of this process. A test that ends one without a word is asked in a new interpreter.

        Threads are not forked: what waits for one that this process had (autograd's, in ``backward``) may abort.
        """
        begin = 0
        while begin < len(tests):
            ran = self._forked(tests[begin:], limits[begin:], swap)
            if ran.outcome != "died" or ran.test not in tests:
                return ran
            at = tests.index(ran.test)
            ran = interpreted(tests[at : at + 1], limits[at : at + 1])
            if ran.outcome != "passed":
                return ran
            begin = at + 1
        return Ran("passed")

    def _forked(self, tests: Sequence[str], limits: Sequence[float], swap: Callable[[], None] | None) -> Ran:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                os.close(read)
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(null, stream)
                if swap:
                    swap()
                run_items([self.items[test] for test in tests], write)
            finally:
                os._exit(0)
        os.close(write)
        return follow(child, read, tests, limits, limits[0] + PATIENCE)

    def fresh(self, tests: Sequence[str], limits: Sequence[float]) -> Ran:
        """In new interpreters: the first few files' tests, which mostly notice, and the rest only if they do not."""
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        few = sum(1 for _ in itertools.takewhile(lambda test: test.partition("::")[0] in files[:FEW], tests))
        for begin, end in ((0, few), (few, len(tests))):
            if begin < end:
                ran = interpreted(tests[begin:end], limits[begin:end])
                if ran.outcome != "passed":
                    return ran
        return Ran("passed")


def interpreted(tests: Sequence[str], limits: Sequence[float]) -> Ran:
    """In a new interpreter, which no test ends without a fault."""
    read, write = os.pipe()
    command = [sys.executable, __file__, "--fresh", str(write)]
    null = subprocess.DEVNULL
    child = subprocess.Popen(
        command, pass_fds=[write], stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
    )
    os.close(write)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(json.dumps(list(tests)).encode())
    ran = follow(child.pid, read, tests, limits, 10 * PATIENCE)
    return Ran("failed", ran.test) if ran.outcome == "died" else ran


class Fresh:
    """The plugin of a new interpreter."""

    def __init__(self, tests: Sequence[str], out: int) -> None:
        self.tests, self.out = tests, out

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        if set(self.tests) <= items.keys():  # one that is not collected any more was noticed
            run_items([items[test] for test in self.tests], self.out)
        return True


def _options() -> list[str]:
    return [*FAST_LANE, *OPTIONS, f"--basetemp={Path.cwd().parent / 'basetemp'}"]


def _fresh(out: int) -> None:
    tests = json.loads(sys.stdin.read())
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    pytest.main([*_options(), *files], plugins=[Fresh(tests, out)])
    os._exit(0)


def _lane(record: Path, work: Path, results: Path) -> None:
    recorded = Record.load(record)
    plan = [Work(**each) for each in json.loads(work.read_text(encoding="utf-8"))]
    files = {recorded.tests[index].partition("::")[0] for each in plan for index in each.tests}
    with results.open("w", encoding="utf-8") as out:

        def say(result: dict[str, Any]) -> None:
            out.write(json.dumps(result) + "\n")
            out.flush()

        status = pytest.main([*_options(), *sorted(files)], plugins=[Lane(recorded, plan, say)])
    raise SystemExit(status)


def lane(folder: Path, record: Path, plan: Sequence[Work], minutes: float | None = None) -> Iterator[dict[str, Any]]:
    """Results of a process of its own in the copy ``folder``, as they come: up to its end, or that of the minutes."""
    ends = math.inf if minutes is None else time.monotonic() + 60 * minutes
    work, results = folder.parent / "work.json", folder.parent / "lane.jsonl"
    work.write_text(json.dumps([vars(each) for each in plan]), encoding="utf-8")
    results.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, folder / "scripts" / "lane.py", record.resolve(), work, results]
    with (folder.parent / "lane.log").open("wb") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        read = 0
        while True:
            ended = child.poll() is not None
            text = results.read_bytes()[read:] if results.exists() else b""
            complete = text[: text.rfind(b"\n") + 1]
            read += len(complete)
            for line in complete.splitlines():
                yield json.loads(line)
            if ended or time.monotonic() > ends:
                break
            time.sleep(0.1)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
            ended = False
    if ended and child.returncode:
        raise SystemExit(f"the tests cannot run: {(folder.parent / 'lane.log').read_text(errors='replace')[-3000:]}")


if __name__ == "__main__":
    if sys.argv[1] == "--fresh":
        _fresh(int(sys.argv[2]))
    else:
        _lane(*map(Path, sys.argv[1:4]))
