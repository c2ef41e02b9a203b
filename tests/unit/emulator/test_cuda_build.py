"""A CUDA build of torch beside torch_npu: refused before it is loaded, or imported without the clash of names."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_npu import emulator
from qwen2_npu.emulator import cuda_build
from qwen2_npu.emulator.settings import EmulatorError

ROOT = Path(cuda_build.__file__).parents[2]
COMMANDS = {
    "verify": ["-m", "qwen2_npu.cli", "verify"],
    "pytest": ["-m", "pytest", "tests/unit/test_errors.py"],
    "emulate": ["-m", "qwen2_npu.cli", "emulate", "--", sys.executable, "-c", "import torch"],
}
STATUS = {"verify": 2, "emulate": 2, "pytest": 4}  # 4: pytest's own for wrong use
WITHOUT_NPU_OR_GPU = {"ASCEND_HOME_PATH": "", "ASCEND_TOOLKIT_HOME": "", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def look_again():
    """What is installed is found out once per process; here it changes."""
    cuda_build.installed.cache_clear()
    yield
    cuda_build.installed.cache_clear()


def stand_in(folder: Path, version: str, library: str = "libc10_cuda.so") -> Path:
    """A folder with a torch that looks like a GPU build, and a torch_npu: importing either says so and ends."""
    for name in ("torch", "torch_npu"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = '13.0'\n")
    (folder / "torch" / "lib").mkdir()
    (folder / "torch" / "lib" / library).write_bytes(b"")
    return folder


def run(arguments: list[str], site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{site}{os.pathsep}{ROOT}"
    own = {**os.environ, **WITHOUT_NPU_OR_GPU, "PYTHONPATH": path, **environment}
    own.pop("QWEN2_NPU_EMULATOR", None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=own, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_build_that_was_not_tried_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    done = run(COMMANDS[command], stand_in(tmp_path, "2.14.1+cu130"))
    assert done.returncode == STATUS[command]
    refusal = "torch 2.14.1+cu130 is a GPU build, and torch_npu ends the process beside it"
    assert done.stderr == f"error: {refusal}: {cuda_build.REPLACE_TORCH}\n"


@pytest.mark.parametrize("command", ["verify", "pytest"])
def test_beside_a_real_npu_every_gpu_build_is_refused(command: str, tmp_path: Path) -> None:
    done = run(COMMANDS[command], stand_in(tmp_path / "site", "2.13.0+cu130"), ASCEND_HOME_PATH=str(tmp_path))
    assert done.returncode == STATUS[command]
    assert done.stderr.startswith("error: torch 2.13.0+cu130 is a GPU build")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.14.1+cu130"])
def test_doctor_names_the_state(version: str, tmp_path: Path) -> None:
    done = run(["-m", "qwen2_npu.cli", "doctor"], stand_in(tmp_path / "site", version), ASCEND_HOME_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "a GPU build" in words
    assert "cannot be imported" in words
    assert "--index-url" in words


@pytest.mark.parametrize(
    ("version", "library", "found"),
    [
        ("2.13.0+cu130", "libc10_cuda.so", "2.13.0+cu130"),
        ("2.13.0+rocm7.0", "libc10_hip.so", "2.13.0+rocm7.0"),
        ("2.13.0+cpu", "libc10.so", ""),
        ("", "libc10_cuda.so", "of unknown version"),
    ],
)
def test_what_is_installed_is_read_from_files(
    version: str, library: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = stand_in(tmp_path, version, library)
    spec = importlib.util.spec_from_file_location("torch", site / "torch" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert cuda_build.installed() == found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cuda_build.installed.cache_clear()
    assert cuda_build.installed() == ""


def test_only_builds_that_were_tried_are_let_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidiactl"
    monkeypatch.setattr(cuda_build, "GPU_DRIVERS", (driver,))
    for version, refused in {"2.13.0+cu130": False, "2.13.1+cu130": True, "2.13.0+rocm7.0": True, "": False}.items():
        monkeypatch.setattr(cuda_build, "installed", lambda version=version: version)
        if refused:
            with pytest.raises(EmulatorError, match="ends the process beside it: pip install"):
                cuda_build.refuse_untried({})
        else:
            cuda_build.refuse_untried({})
    driver.touch()
    cuda_build.refuse_untried({})  # a CPU build sees no GPU
    monkeypatch.setattr(cuda_build, "installed", lambda: "2.13.0+cu130")
    cuda_build.refuse_untried({"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(EmulatorError, match="hide the GPU with CUDA_VISIBLE_DEVICES= before"):
        cuda_build.refuse_untried({"CUDA_VISIBLE_DEVICES": "0"})


@pytest.mark.parametrize("elements", [1, 23])
def test_a_set_becomes_empty(elements: int) -> None:
    memory = ctypes.create_string_buffer(cuda_build._SET.pack(1, 29, 1, elements, 1.0, 29, 0))
    cuda_build._empty(ctypes.addressof(memory))
    only_bucket = ctypes.addressof(memory) + cuda_build._SET.size - struct.calcsize("P")
    assert cuda_build._SET.unpack(memory.raw[: cuda_build._SET.size]) == (only_bucket, 1, 0, 0, 1.0, 0, 0)


NOT_THE_SET = {
    "no buckets": (0, 29, 1, 23, 1.0, 29, 0),
    "no first name": (1, 29, 0, 23, 1.0, 29, 0),
    "another load": (1, 29, 1, 23, 0.5, 29, 0),
    "more names than buckets": (1, 29, 1, 30, 1.0, 29, 0),
    "too many buckets": (1, 1001, 1, 23, 1.0, 29, 0),
    "no names": (1, 29, 1, 0, 1.0, 29, 0),
}


@pytest.mark.parametrize("content", NOT_THE_SET.values(), ids=NOT_THE_SET)
def test_what_does_not_look_like_the_set_is_left_alone(content: tuple[float, ...]) -> None:
    memory = ctypes.create_string_buffer(cuda_build._SET.pack(*content))
    before = memory.raw
    with pytest.raises(EmulatorError, match="laid out in another way"):
        cuda_build._empty(ctypes.addressof(memory))
    assert memory.raw == before


LIKE_CUDA = """
#include <c10/core/AllocatorConfig.h>

static const bool registered = [] {
  c10::CachingAllocator::AcceleratorAllocatorConfig::registerDeviceConfigParserHook(
      [](const std::string&) {}, {"pinned_reserve_segment_size_mb", "release_lock_on_cudamalloc"});
  return true;
}();
"""

IMPORT = """
import os, sys
from qwen2_npu.emulator import cuda_build
cuda_build.installed = lambda: sys.argv[2]
import ctypes, importlib
from qwen2_npu import emulator
emulator.activate()
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
ctypes.CDLL(sys.argv[1])  # as libc10_cuda.so comes with the import of its torch
import torch_npu
print((torch.ones(3, device="npu") * 2).sum().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
@pytest.mark.skipif(bool(cuda_build.installed()), reason="torch is a CUDA build itself")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_torch_npu_is_imported_beside_what_a_cuda_build_registers(tmp_path: Path) -> None:
    import torch

    headers = Path(torch.__file__).parent / "include"
    library, source = tmp_path / "like_cuda.so", tmp_path / "like_cuda.cpp"
    source.write_text(LIKE_CUDA)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)]
    subprocess.run([*command, f"-L{headers.parent / 'lib'}", "-lc10"], check=True)

    def imported(build: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", IMPORT, str(library), build], capture_output=True, text=True)

    done = imported("2.13.0+cu130")
    assert done.stdout == "6.0\n", done.stderr
    clash = imported("")  # as where nothing is done about it
    assert clash.returncode < 0
    assert "Duplicated key 'pinned_reserve_segment_size_mb'" in clash.stderr
