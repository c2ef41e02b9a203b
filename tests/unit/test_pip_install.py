"""scripts/pip_install.py: the CPU build where it can be had, and what there is where it cannot; by uv, else by pip."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
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

_SPEC = importlib.util.spec_from_file_location("pip_install", SCRIPT)
assert _SPEC is not None
assert _SPEC.loader is not None
pip_install = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pip_install)


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


NOWHERE = "http://127.0.0.1:9/simple"  # no one listens

Found = dict[str, tuple[str, str]]


def install(indexes: Path, torch_index: str, *arguments: str, uv: bool = True, **settings: str) -> tuple[int, Found]:
    """Run the script in an environment without torch; its status, and what is installed afterwards by whom.

    Args:
        uv: whether there is one; the index that would be asked for it has none.
        settings: more variables, of pip's configuration.
    """
    venv.create(indexes / "venv", symlinks=True)
    (indexes / "tools").mkdir()
    # Quicker than to install it. Not found by an import: setuptools takes that for pip at work, and changes distutils.
    (indexes / "tools" / "pip").symlink_to(importlib.metadata.distribution("pip").locate_file("pip"))
    if uv:
        program = pip_install.find_uv()
        assert program is not None, "uv belongs to the test extra"
        (indexes / "venv" / "bin" / "uv").symlink_to(Path(program).resolve())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))},
        "PATH": str(indexes / "venv" / "bin"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": (indexes / "pypi").as_uri(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PYTHONPATH": str(indexes / "tools"),
        "QWEN2_NPU_TORCH_INDEX": torch_index if "://" in torch_index else (indexes / torch_index).as_uri(),
        "UV_CACHE_DIR": str(indexes / "cache"),
        **settings,
    }
    done = subprocess.run([indexes / "venv" / "bin" / "python", SCRIPT, *arguments], env=environment)
    found: Found = {}
    for folder in (indexes / "venv").glob("lib/python*/site-packages/*.dist-info"):
        name, version = folder.name.removesuffix(".dist-info").split("-")
        found[name] = (version, (folder / "INSTALLER").read_text().strip())
    return done.returncode, found


@pytest.mark.parametrize("by", ["uv", "pip"])
def test_the_cpu_build_is_taken_where_it_can_be_had(indexes: Path, by: str) -> None:
    status, found = install(indexes, "cpu", "other", f"torch=={RELEASE}", uv=by == "uv")
    assert status == 0
    assert found == {"torch": (f"{RELEASE}+cpu", by), "other": ("1.0", by)}


@pytest.mark.parametrize("by", ["uv", "pip"])
def test_without_its_index_pip_takes_what_there_is(indexes: Path, by: str) -> None:
    """And uv the rest: torch is there."""
    status, found = install(indexes, NOWHERE, "other", f"torch=={RELEASE}", uv=by == "uv")
    assert status == 0
    assert found == {"torch": (RELEASE, "pip"), "other": ("1.0", by)}


def test_a_wheel_that_pip_finds_needs_no_index_of_pytorch(indexes: Path) -> None:
    wheels = str(indexes / "cpu" / "torch")
    status, found = install(indexes, NOWHERE, "other", PIP_FIND_LINKS=wheels)
    assert status == 0
    assert found == {"torch": (f"{RELEASE}+cpu", "uv"), "other": ("1.0", "uv")}


@pytest.mark.parametrize("uv", [True, False])
def test_a_failure_is_pip_s_own(indexes: Path, uv: bool) -> None:
    status, found = install(indexes, "cpu", "not-there", uv=uv)
    assert status == 1
    assert "not" not in found


def test_a_setting_that_is_off_is_none(indexes: Path) -> None:
    """tox sets this one."""
    status, found = install(indexes, "cpu", "other", PIP_USER="0")
    assert status == 0
    assert found["other"] == ("1.0", "uv")


def test_a_setting_that_uv_is_not_told_is_for_pip(indexes: Path) -> None:
    status, found = install(indexes, "cpu", "other", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(indexes / "pypi" / "other"))
    assert status == 0
    assert found == {"other": ("1.0", "pip")}


def test_settings_are_pip_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables before the section of the command before that of all commands; other commands' count for nothing."""
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://a.example/simple\ncert = a.pem\n[install]\nindex-url = https://b.example/simple\n"
        "trusted-host =\n    b.example\n    c.example\n[download]\nno-index = 1\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_CERT", "b.pem")
    monkeypatch.setattr(pip_install, "find_uv", lambda: "uv")
    found = pip_install.uv_command()
    assert found is not None
    command, environment = found
    pairs = list(itertools.pairwise(command))
    assert [value for option, value in pairs if option == "--index-url"] == ["https://b.example/simple"]
    assert [value for option, value in pairs if option == "--allow-insecure-host"] == ["b.example", "c.example"]
    assert environment["SSL_CERT_FILE"] == os.environ.get("SSL_CERT_FILE", "b.pem")


def test_one_index_everywhere() -> None:
    script, page = SCRIPT.read_text(encoding="utf-8"), (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f'CPU_INDEX = "{cuda_build.CPU_INDEX}"' in script
    assert f"--index-url {cuda_build.CPU_INDEX}" in page
    assert f'"torch=={RELEASE}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
