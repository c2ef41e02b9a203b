"""The file that every child Python runs when it starts: with torches of a few lines."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qwen2_npu.emulator import environment
from qwen2_npu.emulator.settings import VARIABLE, Settings

FAKE = "from qwen2_npu import emulator\nprint('torch', emulator.is_active(), emulator.settings().device_count)\n"


@pytest.fixture
def site(tmp_path):
    (tmp_path / "torch.py").write_text(FAKE)
    return tmp_path


def python(code: str, *path: str, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    clean["PYTHONPATH"] = os.pathsep.join([str(environment.BOOTSTRAP), *path])
    return subprocess.run([sys.executable, "-c", code], env={**clean, **more}, capture_output=True, text=True)


def test_other_programs_pay_nothing(site):
    done = python("import sys; print('qwen2_npu' in sys.modules)", str(site), **{VARIABLE: "{"})
    assert done.stdout == "False\n", done.stderr


def test_without_settings_nothing_happens(site):
    done = python("import sys, torch", str(site))
    assert "the emulator is not active" in done.stderr


def test_the_sitecustomize_it_hides_is_run(site):
    (site / "sitecustomize.py").write_text("print('theirs')\n")
    assert python("pass", str(site)).stdout == "theirs\n"
    assert python("import sitecustomize; print(sitecustomize.__file__)", str(site)).stdout.endswith(
        f"{site}/sitecustomize.py\n"
    )


def test_what_goes_wrong_is_one_line(site):
    done = python("import torch", str(site), **{VARIABLE: "{"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the emulated NPU cannot be provided: QWEN2_NPU_EMULATOR='{' does not hold")


@pytest.mark.parametrize("name", ["torch", "torch_npu"])
def test_an_absent_torch_is_as_absent_as_ever(name):
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\nimport " + name
    done = python(code, **{VARIABLE: Settings().to_json()})
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr
