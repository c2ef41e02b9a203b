"""Which functions the installed torch_npu expects of CANN: read from the wheel's own ELF tables."""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from qwen2_npu.emulator.settings import EmulatorError

SYSTEM_LIBRARIES = ("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2")

ENTRY_64 = "IBBHQQ"
"""Elf64_Sym: name, info, other, section index, value, size."""
UNDEFINED, GLOBAL = 0, 1
"""A section index, and a binding, as the ELF specification numbers them."""

INTERPRETER = ("Py", "_Py")
"""Prefixes of what the Python executable itself provides."""


def missing(wheel: Path, torch: Path) -> list[str]:
    """Strong undefined symbols of torch_npu's libraries that torch, the interpreter and the system do not define.

    Args:
        wheel: folder of the installed torch_npu package.
        torch: folder of the installed torch package.

    Raises:
        EmulatorError: a library cannot be read, as in a broken installation.
    """
    libraries = shared_objects(wheel)
    if not libraries:
        raise EmulatorError(f"no shared library in {wheel}: reinstall torch_npu")
    wanted: set[str] = set()
    provided: set[str] = set()
    for path in libraries:
        undefined, defined = tables(path)
        wanted |= undefined
        provided |= defined
    for path in [*shared_objects(torch), *_system_libraries()]:
        provided |= tables(path)[1]
    return sorted(name for name in wanted - provided if not name.startswith(INTERPRETER))


def needed_libraries(wheel: Path, provided_by: Path) -> list[str]:
    """DT_NEEDED names of the wheel that neither the wheel, torch nor the system has: CANN's libraries."""
    present = {path.name for path in [*shared_objects(wheel), *shared_objects(provided_by)]}
    needed = {name for path in shared_objects(wheel) for name in _needed(path)}
    return sorted(name for name in needed - present if not _is_system(name))


def shared_objects(package: Path) -> list[Path]:
    """Every shared library below ``package`` and in auditwheel's folder beside it."""
    beside = package.parent / f"{package.name}.libs"
    return [path for folder in (package, beside) for path in sorted(folder.rglob("*.so*")) if path.is_file()]


def tables(path: Path) -> tuple[set[str], set[str]]:
    """(strongly undefined, defined) names in the dynamic symbol table of ``path``."""
    undefined: set[str] = set()
    defined: set[str] = set()
    with _elf(path) as elf:
        section = elf.get_section_by_name(".dynsym")
        if not isinstance(section, SymbolTableSection):
            return undefined, defined
        if elf.elfclass != 64:
            raise EmulatorError(f"{path} is for a {elf.elfclass}-bit machine: torch_npu is for 64-bit ones")
        names = elf.get_section(section["sh_link"]).data()
        # pyelftools makes an object per symbol, and libtorch has hundreds of thousands: the entries are read here.
        entries = struct.iter_unpack(("<" if elf.little_endian else ">") + ENTRY_64, section.data())
        for offset, info, _, index, _, _ in entries:
            if not offset:
                continue
            name = names[offset : names.index(0, offset)].decode()
            if index != UNDEFINED:
                defined.add(name)
            elif info >> 4 == GLOBAL:
                undefined.add(name)
    return undefined, defined


def _needed(path: Path) -> Iterator[str]:
    with _elf(path) as elf:
        section = elf.get_section_by_name(".dynamic")
        for tag in section.iter_tags() if isinstance(section, DynamicSection) else ():
            if tag.entry.d_tag == "DT_NEEDED":
                yield str(tag.needed)  # type: ignore[attr-defined]  # pyelftools sets it for this kind


class _elf:  # noqa: N801
    """ELFFile as a context manager that closes its file and names it in errors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ELFFile:
        try:
            self.stream = self.path.open("rb")
        except OSError as error:
            raise EmulatorError(f"{self.path} cannot be read ({error.strerror}): make it readable") from error
        try:
            return ELFFile(self.stream)
        except ELFError as error:
            self.stream.close()
            raise EmulatorError(f"{self.path} is not a shared library ({error}): reinstall torch_npu") from error

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _is_system(name: str) -> bool:
    return name in SYSTEM_LIBRARIES or name.startswith(("ld-linux", "librt.so"))


@cache
def _system_libraries() -> tuple[Path, ...]:
    folders = (
        f"/lib/{platform.machine()}-linux-gnu",
        f"/usr/lib/{platform.machine()}-linux-gnu",
        "/lib64",
        "/usr/lib64",
    )
    found = {
        name: Path(folder) / name for folder in folders for name in SYSTEM_LIBRARIES if (Path(folder) / name).exists()
    }
    loaders = [path for folder in (*folders, "/lib") for path in Path(folder).glob("ld-linux*.so*")]
    if "libc.so.6" not in found:
        raise EmulatorError(f"no libc.so.6 in {', '.join(folders)}: the emulator needs a Linux with glibc")
    return (*found.values(), *loaders)
