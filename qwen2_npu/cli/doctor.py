"""``qwen2-npu doctor``: what is here, what is missing, and how to get it. Never fails."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from qwen2_npu import emulator
from qwen2_npu.cli import options
from qwen2_npu.conformance.files import check_writable
from qwen2_npu.conformance.machine.packages import cann_version, package_version
from qwen2_npu.emulator import compiler, cuda_build, environment
from qwen2_npu.errors import UnsupportedError

CANN_OF_TORCH_NPU = {(2, 7): "8.3", (2, 8): "8.3", (2, 9): "8.5", (2, 10): "9.0"}
"""Release of torch_npu -> the CANN that its own version table names. Newer releases ask for the last one at least."""

OLDEST_DEEPSPEED = (0, 17)
"""As in pyproject.toml."""

INSTALL_DEEPSPEED = "DS_BUILD_OPS=0 pip install deepspeed==0.19.8"


class Finding(NamedTuple):
    """One line. ``advice``: what to do, empty where nothing needs doing."""

    what: str
    state: str
    advice: str = ""


@click.command("doctor")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE.zip",
    help="Also test every operator on the device, and write all of it into one archive for a bug report.",
)
@options.device_option()
def command(bundle: Path | None, device: str | None) -> None:
    """Show versions and devices, what is missing, and how to get it.

    With --bundle: versions, fingerprint, the operator catalogue sample by sample, what the device does where the
    operators' documentation is silent, and logs. Nothing secret is in it: variables on a fixed list, and texts without
    the names of user, home folder and host. Read it before you send it.
    """
    from rich.console import Console

    if bundle is not None:
        check_writable(bundle)
    found = list(findings())
    Console().print(_table(found), markup=False)
    if bundle is not None:
        _write_bundle(bundle, device, found)


def _table(found: list[Finding]) -> Any:
    from rich.table import Table

    table = Table(title="qwen2-npu doctor")
    for header in ("", "found", "to do"):
        table.add_column(header, overflow="fold")
    for finding in found:
        table.add_row(*finding)
    return table


def _write_bundle(path: Path, device: str | None, found: list[Finding]) -> None:
    import json
    import zipfile

    from rich.console import Console

    from qwen2_npu.conformance.machine.bug_report import bundle
    from qwen2_npu.conformance.report.own_files import rewritten

    console = Console(highlight=False)
    text = "\n".join(": ".join(part for part in finding if part) for finding in found) + "\n"
    target = options.check_device(device)
    with options.progress(console, "operators") as progress:
        bundle.write(path, target, text, progress=progress)
    rewritten(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "operators.json" in names:
            operators = json.loads(archive.read("operators.json"))
            counts = Counter[str]()
            for own in operators["totals"].values():
                counts.update({name: own[name] for name in ("passed", "failed", "skipped")})
            console.print(
                f"operators on {operators['verified']}: {', '.join(f'{n} {what}' for what, n in counts.items())}"
            )
    if "problems.txt" in names:
        console.print("some of it could not be found out: see problems.txt in the archive", style="yellow")
    console.print(f"Bundle: {path}")


def findings() -> Iterator[Finding]:
    """Everything, one line each; a probe that breaks is a line, too."""
    yield Finding("python", platform.python_version())
    yield Finding("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    yield from _packages()
    yield _cann()
    yield from _plain_python()
    try:
        emulator.activate_where_needed()
    except emulator.EmulatorError as error:  # importing torch would fail, or end the process
        yield Finding("torch with torch_npu", "cannot be imported", str(error))
        return
    for probe in (_transformers, _deepspeed, _cpu, _npu, _emulator, _cuda):
        try:
            yield probe()
        except Exception as error:  # a broken installation is what this command is for
            yield Finding(
                probe.__name__.strip("_"),
                f"broken: {(str(error) or repr(error)).splitlines()[0]}",
                "reinstall it",
            )
    yield Finding("default device", _default_device())


def _packages() -> Iterator[Finding]:
    torch = package_version("torch")
    yield Finding("qwen2-npu", package_version("qwen2-npu") or "not installed", "")
    yield Finding("torch", *_torch(torch, beside_torch_npu=package_version("torch_npu") is not None))
    torch_npu = package_version("torch_npu")
    advice = "for Ascend NPUs: pip install torch_npu==2.13.0 (the release of the same number as torch)"
    if torch_npu and torch and release(torch_npu) != release(torch):
        yield Finding("torch_npu", torch_npu, f"does not match torch {torch}: install the same release of both")
    else:
        yield Finding("torch_npu", torch_npu or "not installed", "" if torch_npu else advice)
    protobuf = package_version("protobuf")
    if torch_npu:  # whose wheel holds torchair, and does not ask for what torchair imports
        yield Finding("protobuf", protobuf or "missing", "" if protobuf else "torchair needs it: pip install protobuf")
    matplotlib = package_version("matplotlib")
    yield Finding(
        "matplotlib", matplotlib or "not installed", "" if matplotlib else "only for the report: pip install matplotlib"
    )


def _torch(version: str | None, *, beside_torch_npu: bool) -> tuple[str, str]:
    """State and advice: which build it is matters beside torch_npu."""
    if version is None:
        return "missing", cuda_build.INSTALL_TORCH
    if not cuda_build.installed():
        return version, ""
    if not beside_torch_npu:
        return f"{version}, a GPU build", f"before you install torch_npu: {cuda_build.REPLACE_TORCH}"
    return (
        f"{version}, a GPU build beside torch_npu",
        f"works with the emulated NPU alone, and takes gigabytes; for a real NPU: {cuda_build.REPLACE_TORCH}",
    )


def release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13); empty for what is not a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()


def _transformers() -> Finding:
    version = package_version("transformers")
    if version is None:
        return Finding("transformers", "missing", "pip install transformers==5.24.0")
    try:
        importlib.import_module("qwen2_npu.compat")
    except UnsupportedError as error:
        return Finding("transformers", version, str(error))
    return Finding("transformers", version)


def _deepspeed() -> Finding:
    """The launcher: whether its release is one that is served, and whether it can be imported beside this torch."""
    version = package_version("deepspeed")
    if version is None:
        return Finding("deepspeed", "not installed", f"only to launch several ranks: {INSTALL_DEEPSPEED}")
    if not OLDEST_DEEPSPEED <= release(version) < (1, 0):
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        return Finding("deepspeed", version, f"{oldest} to 0.x are served: {INSTALL_DEEPSPEED}")
    try:
        importlib.import_module("deepspeed")
    except Exception as error:  # of its many parts, anything
        reason = (str(error) or repr(error)).splitlines()[0]
        return Finding("deepspeed", f"{version}, cannot be imported: {reason}", INSTALL_DEEPSPEED)
    return Finding("deepspeed", version)


def _cann() -> Finding:
    version = cann_version()
    if version:
        return Finding("CANN", version, cann_advice(version, package_version("torch_npu")))
    return Finding(
        "CANN",
        "not found",
        "for Ascend NPUs: install the CANN toolkit and kernels, then `source …/ascend-toolkit/set_env.sh`",
    )


def _plain_python() -> Iterator[Finding]:
    """A line where torch_npu is installed and CANN is not: ``import torch`` fails there unless something helps it."""
    helped = environment.announced() is not None or emulator.is_active()
    if package_version("torch_npu") is not None and not environment.signs_of_npu() and not helped:
        yield Finding(
            "plain python",
            "cannot `import torch`: torch_npu is installed and CANN is not",
            "use emulated cards: `import qwen2_npu` before torch, or `qwen2-npu emulate -- python script.py`",
        )


def cann_advice(cann: str, torch_npu: str | None) -> str:
    """What to do where ``cann`` is older than ``torch_npu`` asks for; empty where it is not, or nothing is known."""
    asked = release(torch_npu or "")
    known = [entry for entry in CANN_OF_TORCH_NPU if entry <= asked]
    if not known or not release(cann):
        return ""
    wanted = CANN_OF_TORCH_NPU[max(known)]
    if release(cann) >= release(wanted):
        return ""
    name = ".".join(map(str, max(known)))
    return f"older than the CANN {wanted} of torch_npu {name}: upgrade CANN, or take an older torch_npu"


def _cpu() -> Finding:
    import torch

    return Finding(
        "cpu",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )


def _npu() -> Finding:
    if package_version("torch_npu") is None:
        return Finding("npu", "none (torch_npu is not installed)")
    import torch

    importlib.import_module("torch_npu")
    npu: Any = torch.npu  # type: ignore[attr-defined]  # put there by torch_npu
    cards = Counter(npu.get_device_name(index) for index in range(npu.device_count()))
    names = ", ".join(f"{count} × {name}" for name, count in cards.items())
    if emulator.is_active():
        return Finding("npu", f"EMULATED: {names}, computed on the CPU; there is no NPU here")
    return Finding("npu", names or "none found", "" if names else "check `npu-smi info` and the driver")


def _emulator() -> Finding:
    """The emulated NPU: what it pretends to be, and the compiler that builds its libraries."""
    if emulator.is_active():
        settings = emulator.settings()
        memory = f"{settings.hbm_bytes / 2**30:.0f} GiB each"
        return Finding("emulator", f"active: {settings.device_count} × {settings.soc}, {memory}, CANN {settings.cann}")
    if package_version("torch_npu") is None:
        return Finding("emulator", "not available", "pip install torch_npu==2.13.0: it needs no NPU")
    try:
        found = shlex.join(compiler.command())
    except emulator.EmulatorError as error:
        return Finding("emulator", "not active; no C compiler", str(error))
    return Finding("emulator", f"not active (a real NPU or CANN is here); C compiler {found}")


def _cuda() -> Finding:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Finding("cuda", f"{count}: {torch.cuda.get_device_name(0)}" if count else "none found")


def _default_device() -> str:
    try:
        return options.default_device()
    except Exception as error:
        return f"unknown ({error!r})"
