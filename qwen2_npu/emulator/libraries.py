"""CANN's libraries as torch_npu looks for them: built once per wheel with the C compiler, then loaded.

All code is in one library, ``libascendcl.so``; each other name CANN has is an empty library that leads to it, so that
both the loader's lookups and dlsym on any of them succeed. They must be loaded before torch_npu: the loader then finds
them by name and needs no LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import platformdirs
from filelock import FileLock

from qwen2_npu.emulator import symbols
from qwen2_npu.emulator.settings import EmulatorError

SOURCES = tuple(sorted((Path(__file__).parent / "cann").glob("*.c")))

MAIN = "libascendcl.so"

LOADED_LATER = ("libatb.so", "libhcomm.so")
"""Looked for by torch_npu itself, when an operator of it is first used."""

HARMLESS = (
    *("Msprof", "_ZN2ge", "_ZNK2ge", "aclCreateTensorDesc", "aclDestroyTensorDesc", "aclGetTensorDesc"),
    *("aclSetTensor", "acltdt", "HcclSetConfig"),
)
"""Prefixes of names that may do nothing where ``cann/`` does not implement them: profiling, descriptions that only an
operator of CANN's would read, and the graph engine, which ``ge`` replaces. Every other one fails and says so."""

DATA = ("_ZTV", "_ZTI", "_ZTS", "_ZTT", "_ZGV")
"""Prefixes of C++ names that are data, for which no function can stand in."""

COMPLETE = "complete"
"""Marker file of a finished build."""


def load() -> ctypes.CDLL:
    """Build if needed, load for everybody in the process, and return the main library.

    Raises:
        EmulatorError: torch_npu is missing, no C compiler, or nowhere to build.
    """
    folder = build()
    library = ctypes.CDLL(str(folder / MAIN), mode=ctypes.RTLD_GLOBAL)
    for path in sorted(folder.glob("*.so")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return library


def build() -> Path:
    """Folder of the built libraries; builds them where no other process has."""
    wheel, torch = _package("torch_npu"), _package("torch")
    key = _key()
    candidates = [base / key for base in _bases()]
    for folder in candidates:
        if (folder / COMPLETE).exists():
            _check_owner(folder)
            return folder
    problems = []
    for folder in candidates:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _check_owner(folder.parent)
            with FileLock(f"{folder}.lock"):
                if not (folder / COMPLETE).exists():
                    _build_into(folder, wheel, torch)
            return folder
        except OSError as error:
            problems.append(f"{folder.parent}: {error.strerror or error}")
    raise EmulatorError(
        f"no folder to build the emulator's libraries in ({'; '.join(problems)}): "
        "make one of them writable, or set QWEN2_NPU_CACHE to a folder that is"
    )


def _bases() -> list[Path]:
    """Where builds may live, best first. A read-only home falls back to the temporary folder."""
    chosen = os.environ.get("QWEN2_NPU_CACHE")
    if chosen:
        return [Path(chosen)]
    return [
        Path(platformdirs.user_cache_dir("qwen2_npu")) / "emulator",
        Path(tempfile.gettempdir()) / f"qwen2_npu-{os.getuid()}" / "emulator",
    ]


def _check_owner(folder: Path) -> None:
    """Code is loaded from here: a folder that somebody else made, as in a shared temporary folder, is not trusted."""
    owner = folder.stat().st_uid
    if owner not in (os.getuid(), 0):
        raise EmulatorError(f"{folder} belongs to user {owner}: remove it, or set QWEN2_NPU_CACHE to a folder of yours")


def _key() -> str:
    """Names what a build depends on: wheel, torch, machine, and this project's own sources."""
    digest = hashlib.sha256()
    for source in (*SOURCES, Path(__file__), Path(symbols.__file__)):
        digest.update(source.read_bytes())
    return f"torch_npu-{_version('torch_npu')}-torch-{_version('torch')}-{platform.machine()}-{digest.hexdigest()[:12]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise EmulatorError(
            f"{name} is not installed; the emulated NPU runs the real one: pip install torch==2.13.0 torch_npu==2.13.0"
        ) from None


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        _version(name)
        raise EmulatorError(f"{name} is installed but cannot be found: reinstall it")
    return Path(spec.origin).parent


def _build_into(folder: Path, wheel: Path, torch: Path) -> None:
    """Build beside ``folder`` and move into place, so that a killed build leaves nothing that looks finished."""
    compiler = _compiler()
    for stale in folder.parent.glob(f"{folder.name}.*"):  # of killed builds: the lock is held, none is running
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        generated = work / "missing.c"
        names = symbols.missing(wheel, torch)
        generated.write_text(source_for(names))
        _compile(compiler, [*map(str, SOURCES), str(generated)], work / MAIN, ["-lpthread"])
        _check_complete(names, work / MAIN)
        empty = work / "empty.c"
        # One function, so that unwinders find frame tables.
        empty.write_text("__attribute__((used)) static void emu_nothing_here(void) {}\n")
        for name in {*symbols.needed_libraries(wheel, torch), *LOADED_LATER} - {MAIN}:
            flags = ["-Wl,--no-as-needed", f"-L{work}", f"-l:{MAIN}", "-Wl,-rpath,$ORIGIN"]
            _compile(compiler, [str(empty)], work / name, flags)
        (work / COMPLETE).write_text("")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_complete(names: list[str], library: Path) -> None:
    """Raise where a symbol of the wheel is still missing: loading torch_npu would fail later, and less clearly."""
    unresolved = sorted(set(names) - symbols.tables(library)[1])
    if unresolved:
        raise EmulatorError(
            f"torch_npu {_version('torch_npu')} needs {', '.join(unresolved)}, which the emulator does not provide: "
            "2.13.0 is the version it was made for"
        )


def source_for(names: list[str]) -> str:
    """C source of a weak function for every name: the files of ``cann/`` override those that they implement.

    Names of data, and names that C has no way to write, are left out.
    """
    lines = ["long emu_nothing(const char *name);", "long emu_refuse(const char *name);"]
    for name in names:
        if name.startswith(DATA) or not name.isidentifier():
            continue
        answer = "nothing" if name.startswith(HARMLESS) else "refuse"
        lines.append(f'__attribute__((weak)) long {name}(void) {{ return emu_{answer}("{name}"); }}')
    return "\n".join(lines) + "\n"


def _compiler() -> str:
    """The C compiler: ``CC``, Python's own, or one of the usual names."""
    asked = os.environ.get("CC")
    candidates = [asked] if asked else [(sysconfig.get_config_var("CC") or "cc").split()[0], "cc", "gcc", "clang"]
    for candidate in candidates:
        path = shutil.which(candidate)
        if path:
            return path
    raise EmulatorError(
        f"no C compiler ({', '.join(dict.fromkeys(candidates))}): the emulated NPU's libraries are built once; "
        "install one (apt-get install gcc), or name one in CC"
    )


def _compile(compiler: str, sources: list[str], output: Path, flags: list[str]) -> None:
    command = [compiler, "-std=gnu11", "-O2", "-fPIC", "-shared", f"-Wl,-soname,{output.name}", *sources, *flags]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
