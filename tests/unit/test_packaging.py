"""What setuptools puts beside the Python files: everything in the packages that is no Python file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PATTERNS = SETTINGS["package-data"]

NOT_SHIPPED = {".pyc", ".pyo"}


def shipped() -> set[Path]:
    """The files that the patterns name."""
    folders = {package: ROOT / package.replace(".", "/") for package in PATTERNS}
    return {
        path for package, folder in folders.items() for pattern in PATTERNS[package] for path in folder.glob(pattern)
    }


def test_every_data_file_is_shipped():
    files = {path for path in (ROOT / "qwen2_npu").rglob("*") if path.is_file()}
    data = {path for path in files if path.suffix not in {".py", *NOT_SHIPPED}}
    missing = sorted(str(path.relative_to(ROOT)) for path in data - shipped())
    assert not missing


def test_python_files_in_folders_that_are_no_package_are_shipped():
    python = [path for path in (ROOT / "qwen2_npu").rglob("*.py") if not (path.parent / "__init__.py").exists()]
    assert python, "bootstrap has none"
    assert set(python) <= shipped()


@pytest.mark.parametrize(
    ("package", "pattern"), [(p, pattern) for p, patterns in PATTERNS.items() for pattern in patterns]
)
def test_every_pattern_finds_something(package, pattern):
    folder = ROOT / package.replace(".", "/")
    assert (folder / "__init__.py").is_file()
    assert list(folder.glob(pattern))
