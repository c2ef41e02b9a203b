"""Imports point one way (docs/architecture.md), and importing the package imports no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import qwen2_npu

PACKAGE = Path(qwen2_npu.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "optimizations", "devices"),
    ("ops",),
    ("emulator",),
    ("compat", "cache"),
    ("parallel",),
    ("checkpoint",),
    ("models",),
    ("graph",),
    ("conformance",),
    ("cli",),
)
"""From the bottom up: a module imports from its own layer and from those before it."""

ROOMS: tuple[tuple[str, ...], ...] = (
    ("children", "files", "jobs", "sizes", "tiny", "tiny_moe", "operators"),
    ("machine",),
    ("accuracy",),
    ("graph",),
    ("perf",),
    ("report",),
)
"""The same within ``conformance``."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path, package: str = "qwen2_npu") -> set[str]:
    """Names directly below ``package`` that the file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    below = {name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}.")}
    return {name.split(".")[0] for name in below}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    upwards = {name for name in imports(path) & RANK.keys() if RANK[name] > RANK[layer_of(path)]}
    assert not upwards, f"{path} imports from a layer above its own: {sorted(upwards)}"


def test_rooms_of_conformance_import_one_way():
    rank = {name: place for place, rooms in enumerate(ROOMS) for name in rooms}
    folder = PACKAGE / "conformance"
    found = {path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")}
    assert found == {*rank, "__init__"}, "a new room has its place in ROOMS"
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        imported = imports(path, "qwen2_npu.conformance") & rank.keys()
        upwards = {name for name in imported if rank[name] > rank.get(own, -1)}
        assert not upwards, f"{path} imports from a room above its own: {sorted(upwards)}"


def test_a_wrong_import_would_be_seen(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("from qwen2_npu.conformance import compare\nimport qwen2_npu.cli\n")
    assert imports(path) == {"conformance", "cli"}
    assert imports(path, "qwen2_npu.conformance") == {"compare"}


def definitions(tree: ast.Module, place: str) -> Iterator[tuple[str, str]]:
    """Public classes and type aliases of a module: name, and what it stands for. The same alias twice is one."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name, f"class in {place}"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, ast.unparse(node.value)


def names_of_several(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Name -> what it stands for, where that is more than one thing; of aliases those that are written ``LikeThis``."""
    found: dict[str, set[str]] = {}
    for place, tree in trees.items():
        for name, meaning in definitions(tree, place):
            if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
                found.setdefault(name, set()).add(meaning)
    return {name: meanings for name, meanings in found.items() if len(meanings) > 1}


def test_a_name_of_a_class_is_used_once():
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    assert not names_of_several(trees)


def test_a_second_class_of_a_name_would_be_seen():
    code = {
        "one": "class A1b: ...\nclass _Own: ...\nArray = list[int]\nBuild = list[int]",
        "two": "class A1b: ...\nclass _Own: ...\nArray = list[int]\nclass Build: ...",
    }
    trees = {place: ast.parse(text) for place, text in code.items()}
    assert names_of_several(trees).keys() == {"A1b", "Build"}


def test_importing_the_package_imports_no_torch():
    code = "import sys, qwen2_npu; print(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_every_public_name_is_there():
    for name in qwen2_npu.__all__:
        assert getattr(qwen2_npu, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Qwen3'"):
        qwen2_npu.Qwen3  # noqa: B018
