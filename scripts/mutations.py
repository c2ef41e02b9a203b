"""Small faults in a Python source, one at a time: what ``mutants.py`` puts into the judges of the suite.

A mutation replaces one span of the text and leaves all else as it is, so that its line numbers stay right. Left alone,
since they are words and not rules: texts, type annotations, docstrings, ``__str__`` and ``describe``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

COMPARISONS: dict[str, tuple[str, ...]] = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==", "<", ">"),
    "in": ("not in",),
    "not in": ("in",),
    "is": ("is not",),
    "is not": ("is",),
}
COMPARISON = re.compile(r"<=|>=|==|!=|<|>|\bnot\s+in\b|\bis\s+not\b|\bin\b|\bis\b")

ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "+"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.Pow: ("**", "*"),
}  # fmt: skip

CALLS = {"any": "all", "all": "any", "min": "max", "max": "min"}

EARLY: dict[str, tuple[str, ...]] = {"bool": ("True", "False"), "str": ('""',), "list": ("[]",), "tuple": ("()",)}
"""What a function may return at once, by the beginning of its annotation."""

WORDS = ("__str__", "__repr__", "describe")


@dataclass(frozen=True)
class Mutation:
    """``source[start:end]`` becomes ``new``.

    Attributes:
        where: the function, with its class.
        count: which one it is of those with the same words in the same function.
    """

    where: str
    line: int
    start: int
    end: int
    old: str
    new: str
    count: int = 1

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    @property
    def name(self) -> str:
        """What it is, without its line, so that a reason written down for it outlives changes elsewhere."""
        again = f" (number {self.count})" if self.count > 1 else ""
        return f"{self.where}: {' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'nothing'}{again}"


class Finder:
    """Walks one source; see :func:`mutations`."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.where: list[str] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.lines[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.lines[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def text(self, start: int, end: int) -> str:
        return self.source[start:end].decode()

    def change(self, start: int, end: int, new: str) -> Mutation:
        line = self.source.count(b"\n", 0, start) + 1
        return Mutation(".".join(self.where) or "module", line, start, end, self.text(start, end), new)

    def of(self, node: ast.AST, template: str) -> Mutation:
        """``{}`` in the template stands for the node's text."""
        start, end = self.span(node)
        return self.change(start, end, template.replace("{}", self.text(start, end)))

    def walk(self, node: ast.AST) -> Iterator[Mutation]:
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named:
            if node.name in WORDS:  # type: ignore[union-attr]
                return
            self.where.append(node.name)  # type: ignore[union-attr]
        found = getattr(self, f"visit_{type(node).__name__}", None)
        if found is not None:
            yield from found(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # zip's, which is an assertion of its own
                continue
            if field == "slice" and isinstance(value, ast.Tuple):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.walk(child)
        if named:
            self.where.pop()

    # ---- expressions ------------------------------------------------------------------------------------------------
    def visit_Compare(self, node: ast.Compare) -> Iterator[Mutation]:  # noqa: N802
        left = node.left
        for right in node.comparators:
            start, end = self.span(left)[1], self.span(right)[0]
            found = COMPARISON.search(self.text(start, end))
            assert found is not None
            others = COMPARISONS[" ".join(found.group().split())]
            ordered = not isinstance(right, ast.Constant) or isinstance(right.value, int | float)
            for other in others if ordered else others[:1]:
                yield self.change(start + found.start(), start + found.end(), other)
            left = right

    def visit_BoolOp(self, node: ast.BoolOp) -> Iterator[Mutation]:  # noqa: N802
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        start, end = self.span(node)
        parts = [self.text(*self.span(value)) for value in node.values]
        yield self.change(start, end, "(" + f") {new} (".join(parts) + ")")
        for left_out in range(len(parts)):
            rest = [f"({part})" for index, part in enumerate(parts) if index != left_out]
            yield self.change(start, end, f" {old} ".join(rest))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Iterator[Mutation]:  # noqa: N802
        if isinstance(node.op, ast.Not | ast.Invert) or not isinstance(node.operand, ast.Constant):
            yield self.change(*self.span(node), f"({self.text(*self.span(node.operand))})")

    def visit_BinOp(self, node: ast.BinOp) -> Iterator[Mutation]:  # noqa: N802
        if type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            start, end = self.span(node.left)[1], self.span(node.right)[0]
            at = self.text(start, end).index(old)
            yield self.change(start + at, start + at + len(old), new)

    def visit_Constant(self, node: ast.Constant) -> Iterator[Mutation]:  # noqa: N802
        if isinstance(node.value, bool):
            yield self.of(node, str(not node.value))
        elif isinstance(node.value, int | float):
            yield self.of(node, "1" if node.value == 0 else "({} * 10)")

    def visit_Call(self, node: ast.Call) -> Iterator[Mutation]:  # noqa: N802
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield self.change(*self.span(node.func), CALLS[node.func.id])

    def negated(self, test: ast.expr) -> Iterator[Mutation]:
        """Unless another mutation does the same."""
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In):
            return
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            yield self.of(test, "(not ({}))")

    def visit_IfExp(self, node: ast.IfExp) -> Iterator[Mutation]:  # noqa: N802
        yield from self.negated(node.test)

    def visit_comprehension(self, node: ast.comprehension) -> Iterator[Mutation]:
        yield self.of(node.iter, "list({})[:1]")
        for condition in node.ifs:
            yield from self.negated(condition)
            yield self.of(condition, "True")

    def elements(self, node: ast.Tuple | ast.List | ast.Set) -> Iterator[Mutation]:
        """One element fewer."""
        if len(node.elts) < 2 or isinstance(getattr(node, "ctx", None), ast.Store):
            return
        spans = [self.span(element) for element in node.elts]
        for index, (start, end) in enumerate(spans):
            last = index == len(spans) - 1
            cut = (spans[index - 1][1], end) if last else (start, spans[index + 1][0])
            keep = "," if isinstance(node, ast.Tuple) and len(spans) == 2 and last else ""
            trailing = self.text(end, self.span(node)[1]).lstrip().startswith(",")
            yield self.change(*cut, "" if trailing else keep)

    visit_Tuple = visit_List = visit_Set = elements  # noqa: N815

    def visit_Dict(self, node: ast.Dict) -> Iterator[Mutation]:  # noqa: N802
        spans = [
            (self.span(value if key is None else key)[0] - (2 if key is None else 0), self.span(value)[1])
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        for index, (start, end) in enumerate(spans):
            if index < len(spans) - 1:
                yield self.change(start, spans[index + 1][0], "")
            else:
                yield self.change(spans[index - 1][1] if index else start, end, "")

    # ---- statements -------------------------------------------------------------------------------------------------
    def condition(self, node: ast.If | ast.While | ast.Assert) -> Iterator[Mutation]:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield from self.negated(node.test)

    visit_If = visit_While = visit_Assert = condition  # noqa: N815

    def visit_For(self, node: ast.For) -> Iterator[Mutation]:  # noqa: N802
        yield self.of(node.iter, "list({})[:1]")

    def dropped(self, node: ast.stmt) -> Iterator[Mutation]:
        """The statement left out."""
        if not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call | ast.Yield | ast.YieldFrom):
            yield self.of(node, "pass")

    visit_Expr = visit_Raise = visit_AugAssign = visit_Continue = visit_Break = dropped  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> Iterator[Mutation]:  # noqa: N802
        """A word fewer in a list of words, at the module's level."""
        if not self.where and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            start, end = self.span(node.value)
            words = list(re.finditer(r"\w+", self.text(start, end)))
            if len(words) > 2 and self.text(start, end).startswith('"""'):
                for word in words:
                    yield self.change(start + word.start(), start + word.end(), "")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Iterator[Mutation]:  # noqa: N802
        """Nothing done, and a harmless answer at once."""
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        if not body:
            return
        annotation = "" if node.returns is None else self.text(*self.span(node.returns))
        if any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(node)):
            answers: tuple[str, ...] = ("",)
        else:
            kind = next((kind for kind in EARLY if annotation.startswith(kind)), "")
            answers = EARLY[kind] if kind else ("None",) if annotation.endswith("None") else ()
        start = self.span(body[0])[0]
        for answer in answers:
            yield self.change(start, start, f"return {answer}\n{' ' * body[0].col_offset}")


def parses(text: bytes) -> bool:
    """Whether it is Python: a source, or whole lines of one."""
    try:
        ast.parse(b"if True:\n" + text if text[:1].isspace() else text)
    except SyntaxError:
        return False
    return True


class Syntax:
    """Which mutations are Python still: seen in the innermost statement, since parsing takes as long as the text."""

    def __init__(self, source: bytes, tree: ast.AST) -> None:
        self.source = source
        lines = Finder(source).lines
        spans = {
            (lines[min(part.lineno for part in (node, *decorators)) - 1], lines[node.end_lineno or node.lineno])
            for node in ast.walk(tree)
            if isinstance(node, ast.stmt)
            for decorators in [getattr(node, "decorator_list", [])]
        }
        self.spans = sorted(spans, key=lambda span: span[1] - span[0])
        self.alone: dict[tuple[int, int], bool] = {}

    def keeps(self, mutation: Mutation, changed: bytes) -> bool:
        """``changed``: the source with the mutation."""
        longer = len(changed) - len(self.source)
        for start, end in self.spans:
            if start <= mutation.start and mutation.end <= end:
                if (start, end) not in self.alone:  # else and elif are not
                    self.alone[start, end] = parses(self.source[start:end])
                if self.alone[start, end]:
                    return parses(changed[start : end + longer])
        return parses(changed)


@functools.lru_cache(maxsize=8)
def parsed(source: bytes) -> ast.Module:
    """The tree of a file, which thousands of its mutations are looked up in."""
    return ast.parse(source)


def mutations(source: bytes) -> list[Mutation]:
    """Every mutation of a source, in the order of its text."""
    tree = parsed(source)
    syntax = Syntax(source, tree)
    unique: dict[Mutation, None] = {}
    for mutation in Finder(source).walk(tree):
        changed = mutation.apply(source)
        if changed != source and mutation not in unique and syntax.keeps(mutation, changed):
            unique[mutation] = None
    found = sorted(unique, key=lambda mutation: (mutation.start, mutation.end))
    seen: Counter[str] = Counter()
    for index, mutation in enumerate(found):
        seen[mutation.name] += 1
        found[index] = replace(mutation, count=seen[mutation.name])
    return found


def key_of(path: str, name: str) -> str:
    """A mutation's name, short: what docs/power.json knows it by."""
    return hashlib.sha256(f"{path}: {name}".encode()).hexdigest()[:8]


def part_of(path: str, name: str, parts: int) -> int:
    """Which of the parts of all mutations this one belongs to: by its name, so that other changes move it nowhere."""
    return int.from_bytes(hashlib.sha256(f"{path}: {name}".encode()).digest()[:8], "big") % parts


def in_order(path: str, found: Iterable[Mutation], first: Collection[int]) -> list[Mutation]:
    """Those of the lines ``first``, then the others, each in no order that the text has: a part of them is a sample."""
    return sorted(found, key=lambda mutation: (mutation.line not in first, part_of(path, mutation.name, 1 << 63)))
