"""Activating in a process: what is asked, what is found in the environment, and when it refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from qwen2_npu import emulator
from qwen2_npu.emulator.settings import VARIABLE, EmulatorError, Settings

pytestmark = pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "PYTHONPATH")}
    command = [sys.executable, "-c", "from qwen2_npu import emulator\n" + code]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=120)


def test_activating_imports_no_torch_and_tells_children():
    done = python(
        "import os, sys; emulator.activate(device_count=2)\n"
        "print('torch' in sys.modules, emulator.is_active(), emulator.settings().device_count)\n"
        f"print({VARIABLE!r} in os.environ)"
    )
    assert done.stdout.split() == ["False", "True", "2", "True"], done.stderr


@pytest.mark.parametrize(
    "other", [{"soc": "Ascend910B4-1"}, {"device_count": 63}, {"hbm_bytes": 1 << 20}, {"cann": "1.2.3"}], ids=str
)
def test_twice_with_the_same_settings_and_with_others(other):
    assert emulator.activate() == emulator.settings()
    with pytest.raises(EmulatorError, match=r"the emulator is active with .* one process has one set of settings"):
        emulator.activate(**other)


def test_before_it_is_active():
    done = python("print(emulator.is_active(), emulator.activate_from_environment())\nemulator.settings()")
    assert done.stdout.split() == ["False", "None"]
    assert "the emulator is not active: call qwen2_npu.emulator.activate()" in done.stderr.splitlines()[-1]


def test_a_child_takes_its_parent_s_settings():
    settings = Settings("Ascend910B2", 3)
    done = python("print(emulator.activate_from_environment().to_json())", **{VARIABLE: settings.to_json()})
    assert Settings.from_json(done.stdout) == settings, done.stderr


def test_beside_a_real_cann_it_refuses(tmp_path):
    done = python("emulator.activate()", ASCEND_HOME_PATH=str(tmp_path))
    assert "a real CANN or NPU is here" in done.stderr.splitlines()[-1]


def test_after_torch_npu_it_is_too_late():
    code = "import sys, types; sys.modules['torch_npu'] = types.ModuleType('torch_npu'); emulator.activate()"
    assert "torch_npu is already imported" in python(code).stderr.splitlines()[-1]


HIDE = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch_npu' else f(n, *a)"


CPU_BUILD = "from qwen2_npu.emulator import cuda_build; cuda_build.installed = lambda: ''"
"""Beside a real CANN a GPU build is refused: see test_cuda_build.py."""


@pytest.mark.parametrize(
    ("preparation", "environment", "expected"),
    [
        ("", {}, "True"),
        (HIDE, {}, "False"),
        (CPU_BUILD, {"ASCEND_HOME_PATH": "/"}, "False"),
        ("emulator.activate()", {}, "True"),
    ],
    ids=["needed", "no torch_npu", "a real CANN", "active"],
)
def test_where_needed(preparation, environment, expected):
    done = python(f"{preparation}\nprint(emulator.activate_where_needed(), emulator.is_active())", **environment)
    assert done.stdout.split() == [expected] * 2, done.stderr


def test_where_needed_and_not_possible():
    done = python("emulator.activate_where_needed()", QWEN2_NPU_CACHE="/dev/null/cache")
    assert "no folder to build the emulator's libraries in" in done.stderr.splitlines()[-1]


def test_torch_npu_is_what_it_emulates():
    assert importlib.util.find_spec("torch_npu") is not None
