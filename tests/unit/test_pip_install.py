"""scripts/pip_install.py: the CPU build where it can be had, and what there is where it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

from qwen2_npu.emulator import cuda_build

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pip_install.py"
RELEASE = "2.13.0"
pytestmark = [pytest.mark.slow, pytest.mark.slow_in_ci]


def wheel(folder: Path, name: str, version: str) -> None:
    """A package that knows its version, as an index of folders has it: ``folder/name/….whl``."""
    (folder / name).mkdir(parents=True)
    file = f"{name}-{version}-py3-none-any.whl"
    (folder / name / "index.html").write_text(f'<a href="{file.replace("+", "%2B")}">{file}</a>')
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / name / file, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def indexes(tmp_path: Path) -> Path:
    """Two indexes: ``pypi`` with the CUDA build and another package, ``cpu`` with the CPU build."""
    wheel(tmp_path / "pypi", "torch", RELEASE)
    wheel(tmp_path / "pypi", "other", "1.0")
    wheel(tmp_path / "cpu", "torch", f"{RELEASE}+cpu")
    return tmp_path


def install(indexes: Path, cpu_index: Path, *arguments: str) -> tuple[int, dict[str, str]]:
    """Run the script in an environment without torch; its status, and what is installed afterwards."""
    venv.create(indexes / "venv", symlinks=True)
    (indexes / "tools").mkdir()
    # Quicker than to install it. Not found by an import: setuptools takes that for pip at work, and changes distutils.
    (indexes / "tools" / "pip").symlink_to(importlib.metadata.distribution("pip").locate_file("pip"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": (indexes / "pypi").as_uri(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PYTHONPATH": str(indexes / "tools"),
        "QWEN2_NPU_TORCH_INDEX": cpu_index.as_uri(),
    }
    done = subprocess.run([indexes / "venv" / "bin" / "python", SCRIPT, *arguments], env=environment)
    found = (indexes / "venv").glob("lib/python*/site-packages/*.dist-info")
    return done.returncode, dict(path.name.removesuffix(".dist-info").split("-") for path in found)


def test_the_cpu_build_is_taken_where_it_can_be_had(indexes: Path) -> None:
    status, found = install(indexes, indexes / "cpu", "other", f"torch=={RELEASE}")
    assert status == 0
    assert found == {"torch": f"{RELEASE}+cpu", "other": "1.0"}


def test_without_its_index_pip_takes_what_there_is(indexes: Path) -> None:
    status, found = install(indexes, indexes / "nowhere", "other", f"torch=={RELEASE}")
    assert status == 0
    assert found == {"torch": RELEASE, "other": "1.0"}


def test_a_failure_is_pip_s_own(indexes: Path) -> None:
    status, found = install(indexes, indexes / "cpu", "not-there")
    assert status == 1
    assert "not" not in found


def test_one_index_everywhere() -> None:
    script, page = SCRIPT.read_text(encoding="utf-8"), (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f'CPU_INDEX = "{cuda_build.CPU_INDEX}"' in script
    assert f"--index-url {cuda_build.CPU_INDEX}" in page
    assert f'"torch=={RELEASE}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
