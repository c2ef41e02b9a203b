"""The scripts of examples/ run as they are, and so does the README's first one."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu import emulator
from qwen2_npu.conformance import tiny
from qwen2_npu.emulator import automatic
from qwen2_npu.emulator.settings import VARIABLE

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "compare_finetuned": r"241 positions: \d\d.*\n(.*\n)*passed\n$",
    "count_graphs": r"of 9 tokens.*: 2 graphs.*\n.*of 12 tokens.*: 0 graphs.*\n.*of 30 tokens.*: 1 graphs compiled\n$",
    "generate": re.escape(tiny.prompts()[0]) + r".*\w",
}
"""Example -> what it prints."""

SLOW = (pytest.mark.slow, pytest.mark.slow_in_ci)
only_emulated = pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")


def plain_python(script: Path) -> subprocess.CompletedProcess[str]:
    """``python script`` in the environment that the README's first command makes: nobody has prepared anything."""
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return subprocess.run(
        [sys.executable, str(script)], env={**clean, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_all_are_here() -> None:
    assert {path.stem for path in EXAMPLES} == SAYS.keys()


@pytest.mark.parametrize(
    "path",
    # In a process that has imported everything; comparing and compiling take seconds.
    [pytest.param(path, marks=() if path.stem == "generate" else SLOW) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_it_runs(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch._dynamo.reset()
    monkeypatch.setattr(sys, "argv", [str(path)])
    status: object = None
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        status = error.code
    finally:
        torch._dynamo.reset()
    assert not status
    assert re.search(SAYS[path.stem], capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_in_a_plain_python(path: Path) -> None:
    done = plain_python(path)
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[path.stem], done.stdout)


def imports(code: str) -> list[str]:
    """Packages that a script imports, in order, without Python's own."""
    found: list[str] = []
    for node in ast.parse(code).body:
        found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names = [name.split(".")[0] for name in found]
    return [name for name in names if name not in sys.stdlib_module_names]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_imports_this_project_first(path: Path) -> None:
    """What the slow lane shows by running it: torch cannot be imported first where there is no NPU. In CI the README's
    script is run so."""
    assert imports(path.read_text(encoding="utf-8"))[0] == "qwen2_npu"


@only_emulated
@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_the_first_script_of_the_readme(tmp_path: Path) -> None:
    """As it stands there, in a plain Python, with the tiny checkpoint and its prompt in the place of the 7B's. It does
    what examples/generate.py does; the Chinese README has the same code (test_docs.py)."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert imports(code)[0] == "qwen2_npu"
    code, folders = re.subn('"/models/Qwen2-7B-Instruct"', repr(str(tiny.path())), code)
    code, prompts = re.subn(r'tokenizer\("[^"]*"', f"tokenizer({tiny.prompts()[0]!r}", code)
    assert (folders, prompts) == (1, 1)
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    done = plain_python(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS["generate"], done.stdout)
    assert automatic.NOTICE in done.stderr
