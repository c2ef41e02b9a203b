"""``import qwen2_npu`` before torch is enough on a machine without an NPU; with torches of a few lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu import emulator
from qwen2_npu.emulator import automatic, environment
from qwen2_npu.emulator.settings import AUTOMATIC, VARIABLE, EmulatorError, Settings

pytestmark = pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")

ROOT = Path(automatic.__file__).parents[2]

FAKE = """
import sys
emulator = sys.modules.get("qwen2_npu.emulator")
print(emulator.settings().device_count if emulator and emulator.is_active() else "not emulated")
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a torch that prints the number of emulated cards."""
    (tmp_path / "torch.py").write_text(FAKE)
    return tmp_path


def python(code: str, *path: Path, **more: str) -> tuple[str, str]:
    """What a Python prints that nobody has prepared: stdout, stderr."""
    clean = {name: value for name, value in os.environ.items() if name not in (VARIABLE, AUTOMATIC)}
    clean["PYTHONPATH"] = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **more}, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr


def test_torch_after_qwen2_npu_is_emulated_and_says_so_once(site: Path) -> None:
    child = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import qwen2_npu, torch'])"
    assert python(f"import qwen2_npu, torch, qwen2_npu.emulator\n{child}", site) == ("8\n8", automatic.NOTICE)


def test_torch_alone_is_left_alone(site: Path) -> None:
    assert python("import torch, qwen2_npu", site) == ("not emulated", "")


def test_looking_for_torch_activates_nothing(site: Path) -> None:
    code = (
        "import importlib.util, qwen2_npu; from qwen2_npu import emulator\n"
        "print(importlib.util.find_spec('torch').origin, importlib.util.find_spec('torch_npu') is not None)\n"
        "print(emulator.is_active())"
    )
    assert python(code, site) == (f"{site / 'torch.py'} True\nFalse", "")


@pytest.mark.parametrize(
    ("preparation", "variables"),
    [
        (
            "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == 'torch_npu' else f(n)",
            {},
        ),
        ("", {"ASCEND_HOME_PATH": "/"}),
        ("", {"ASCEND_HOME_PATH": "/", AUTOMATIC: "0"}),
    ],
    ids=["no torch_npu", "a real CANN", "a real CANN, forbidden"],
)
def test_where_it_is_not_needed_nothing_happens(site: Path, preparation: str, variables: dict[str, str]) -> None:
    assert python(f"{preparation}\nimport qwen2_npu, torch", site, **variables) == ("not emulated", "")


@pytest.mark.parametrize(
    ("preparation", "variables"),
    [
        ("emulator.activate(device_count=3)", {}),
        ("emulator.activate_where_needed()", {VARIABLE: Settings(device_count=3).to_json()}),
        ("emulator.activate(device_count=3)", {AUTOMATIC: "0"}),
    ],
    ids=["in the script", "by a launcher", "in the script, forbidden otherwise"],
)
def test_who_asked_for_it_is_told_nothing(site: Path, preparation: str, variables: dict[str, str]) -> None:
    code = f"from qwen2_npu import emulator\n{preparation}\nimport torch"
    assert python(code, site, **variables) == ("3", "")


def test_a_launcher_s_child_may_import_it_first(site: Path) -> None:
    found = python("import qwen2_npu, torch", environment.BOOTSTRAP, site, **{VARIABLE: Settings().to_json()})
    assert found == ("8", "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({AUTOMATIC: "0"}, "there is no NPU or CANN here, and QWEN2_NPU_AUTO_EMULATE=0 forbids to emulate one: unset"),
        ({AUTOMATIC: "no"}, "QWEN2_NPU_AUTO_EMULATE='no': give 1 (the default) or 0"),
        ({"QWEN2_NPU_CACHE": "/dev/null/cache"}, "no folder to build the emulator's libraries in"),
    ],
    ids=["forbidden", "neither 0 nor 1", "no place to build"],
)
def test_what_goes_wrong_is_said_at_every_import(site: Path, variables: dict[str, str], message: str) -> None:
    code = "import qwen2_npu\ntry:\n    import torch\nexcept RuntimeError as e:\n    print(e)\nimport torch"
    out, err = python(code, site, **variables)
    assert message in out
    assert f"EmulatorError: {out}" in err.splitlines()[-1]


def test_the_module_keeps_its_own_loader(site: Path) -> None:
    out, err = python(
        "import qwen2_npu, torch\nprint(type(torch.__loader__).__name__, torch.__spec__.loader is torch.__loader__)",
        site,
    )
    assert (out, err) == ("8\nSourceFileLoader True", automatic.NOTICE)


@pytest.mark.slow
def test_torch_npu_imported_first_or_after_a_torch_without_it() -> None:
    """The real ones: both orders that do not fail before this project is imported."""
    first = "import qwen2_npu, torch_npu, torch; print(torch.npu.device_count())"
    later = "import torch, qwen2_npu, torch_npu; print(torch.npu.device_count())"
    assert python(first) == ("8", automatic.NOTICE)
    assert python(later, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == ("8", automatic.NOTICE)


def test_refused_unless_asked_for() -> None:
    for allowed in ({}, {AUTOMATIC: ""}, {AUTOMATIC: "1"}, {AUTOMATIC: "0", VARIABLE: Settings().to_json()}):
        environment.refuse_unasked(allowed)
    with pytest.raises(EmulatorError, match="qwen2-npu emulate"):
        environment.refuse_unasked({AUTOMATIC: "0"})
