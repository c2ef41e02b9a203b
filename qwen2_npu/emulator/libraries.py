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
import platform
from pathlib import Path

from qwen2_npu.emulator import cache, compiler, cuda_build, symbols
from qwen2_npu.emulator.settings import EmulatorError

SOURCES = tuple(sorted((Path(__file__).parent / "cann").glob("*.c")))
HEADERS = tuple(sorted((Path(__file__).parent / "cann").glob("*.h")))

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


def load() -> ctypes.CDLL:
    """Build if needed, load for everybody in the process, and return the main library.

    Raises:
        EmulatorError: torch_npu or a C compiler is missing, there is nowhere to build, or another user could change
            the libraries.
    """
    folder = build()
    try:
        main, *_ = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in cache.names(folder)]
    except OSError as error:
        raise EmulatorError(
            f"{error}: remove {folder}, so that it is built again; or, where that file system allows no programs "
            "(noexec), set QWEN2_NPU_CACHE to a folder on another one"
        ) from error
    return main


def build() -> Path:
    """Folder of the built libraries; builds them where no other process has."""
    wheel, torch = _package("torch_npu"), _package("torch")
    return cache.folder(_key(), lambda folder: _build_into(folder, wheel, torch))


def _key() -> str:
    """Names what a build depends on: wheel, torch, machine, and this project's own sources."""
    digest = hashlib.sha256()
    modules = (Path(str(module.__file__)) for module in (cache, compiler, symbols))
    for source in (*SOURCES, *HEADERS, Path(__file__), *modules):
        try:
            digest.update(source.read_bytes())
        except OSError as error:
            raise EmulatorError(f"{source} cannot be read ({error.strerror}): reinstall qwen2-npu") from error
    return f"torch_npu-{_version('torch_npu')}-torch-{_version('torch')}-{platform.machine()}-{digest.hexdigest()[:12]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise EmulatorError(
            f"{name} is not installed; the emulated NPU runs the real one: {cuda_build.INSTALL_TORCH} torch_npu==2.13.0"
        ) from None


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        _version(name)
        raise EmulatorError(f"{name} is installed but cannot be found: reinstall it")
    return Path(spec.origin).parent


def _build_into(folder: Path, wheel: Path, torch: Path) -> list[str]:
    """Names of the libraries built, the main one first."""
    cc = compiler.command()
    generated = folder / "missing.c"
    names = symbols.missing(wheel, torch)
    generated.write_text(source_for(names))
    compiler.shared_library(cc, [*map(str, SOURCES), str(generated)], folder / MAIN, ["-lpthread"])
    _check_complete(names, folder / MAIN)
    empty = folder / "empty.c"
    # One function, so that unwinders find frame tables.
    empty.write_text("__attribute__((used)) static void emu_nothing_here(void) {}\n")
    others = sorted({*symbols.needed_libraries(wheel, torch), *LOADED_LATER} - {MAIN})
    for name in others:
        flags = ["-Wl,--no-as-needed", f"-L{folder}", f"-l:{MAIN}", "-Wl,-rpath,$ORIGIN"]
        compiler.shared_library(cc, [str(empty)], folder / name, flags)
    generated.unlink()
    empty.unlink()
    return [MAIN, *others]


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
