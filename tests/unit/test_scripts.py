"""Every script and benchmark runs, with a short setting, in a plain Python: nobody has prepared anything.

Where torch_npu is installed and no NPU is, importing torch fails until qwen2_npu has been imported.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu.emulator.settings import VARIABLE
from tests.unit.test_examples import imports

ROOT = Path(__file__).parents[2]
LIBRARIES = {"timing", "mutations", "judges", "library", "lane", "reached"}
"""Files beside them that are parts of programs."""

PROGRAMS = sorted(
    path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py") if path.stem not in LIBRARIES
)

SHORT: dict[str, list[str]] = {
    "bench_cpu": ["--batch=1", "--prompt=8", "--candidate=ours eager", "--rounds=1", "--steps=1", "--no-memory"],
    "bench_emulator": ["--layers=1"],
    "bench_incre_attention": ["--rounds=1"],
    "bench_int8_products": ["--size=64x96", "--rows=2", "--rounds=1"],
    "bench_merge_memory": ["--layers=1", "--tp-size=2"],
    "bench_quantized": ["--shape=0.5B", "--mode=eager", "--batch=1", "--prompt=4", "--rounds=1", "--layers=1"],
    "bench_small_batch": ["--rounds=1"],
    "bench_steps": ["--rounds=1", "--layers=2", "--tokens=8", "--batch=1", "--phase=decode", "--after=kv_scatter"],
    "bench_verify_cost": ["--size=0.5B", "--layers=1", "--steps=fixed_kv_cache", "--random-tokens"],
    "bench_verify_memory": ["--layers=1"],
    "fit_cost_model": ["--json={folder}/found.json", "--page={folder}/page.md"],
    "mutants": ["--help"],
    "pip_install": ["--help"],
    "power_page": [],
    "predict_mixture": [],
    "predict_quantized": [],
    "train_tiny": ["--steps=2", "--documents=400", "--output={folder}"],
    "train_tiny_moe": ["--steps=2", "--documents=400", "--output={folder}"],
}
"""Program -> arguments that make it short, and keep it from writing into the repository."""

NEEDS = {"fit_cost_model": "scipy", "bench_emulator": "torch_npu"}
"""Program -> a package that it documents it needs."""

QUICK = {"mutants", "pip_install", "predict_quantized"}
"""Some that take no longer than Python and torch to start."""

WRITES = {"power_page"}
"""Programs that write into the repository and nowhere else: they are not run."""


def test_all_are_here() -> None:
    assert {path.stem for path in PROGRAMS} == SHORT.keys()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_torch_is_not_imported_before_this_project(path: Path) -> None:
    """What the slow lane shows by running it."""
    named = imports(path.read_text(encoding="utf-8"))
    heavy = [name for name in named if name in ("qwen2_npu", "torch", "transformers", "safetensors", "timing")]
    assert not heavy or heavy[0] == "qwen2_npu", heavy


def test_a_program_that_imports_torch_first_is_seen() -> None:
    assert imports("import torch\nimport qwen2_npu\n")[0] == "torch"
    assert isinstance(ast.parse("import torch").body[0], ast.Import)


@pytest.mark.parametrize(
    "path",
    [
        # What compiles, measures or trains takes minutes together: a job of its own in ci.yml.
        pytest.param(
            path,
            id=path.stem,
            marks=(pytest.mark.slow, pytest.mark.slow_in_ci) if path.stem in QUICK else pytest.mark.slow,
        )
        for path in PROGRAMS
        if path.stem not in WRITES
    ],
)
def test_it_runs_in_a_plain_python(path: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(path.stem)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{path.name} needs {needed}")
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    arguments = [argument.format(folder=tmp_path) for argument in SHORT[path.stem]]
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**clean, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
