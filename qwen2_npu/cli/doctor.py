"""``qwen2-npu doctor``: what is here, what is missing, and how to get it. Never fails."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

import click

from qwen2_npu.cli import options
from qwen2_npu.conformance.environment import cann_version, package_version


class Finding(NamedTuple):
    """One line. ``advice``: what to do, empty where nothing needs doing."""

    what: str
    state: str
    advice: str = ""


@click.command("doctor")
def command() -> None:
    """Show versions and devices, what is missing, and how to get it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="qwen2-npu doctor")
    for header in ("", "found", "to do"):
        table.add_column(header, overflow="fold")
    for finding in findings():
        table.add_row(*finding)
    console = Console()
    console.print(table, markup=False)


def findings() -> Iterator[Finding]:
    """Everything, one line each; a probe that breaks is a line, too."""
    yield Finding("python", platform.python_version())
    yield Finding("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    yield from _packages()
    yield _cann()
    for probe in (_cpu, _npu, _cuda):
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
    yield Finding("torch", torch or "missing", "" if torch else "pip install torch==2.13.0")
    transformers = package_version("transformers")
    yield Finding("transformers", transformers or "missing", "" if transformers else "pip install 'transformers>=5'")
    torch_npu = package_version("torch_npu")
    advice = "for Ascend NPUs: pip install torch_npu==2.13.0 (the release of the same number as torch)"
    if torch_npu and torch and torch_npu.split("+")[0].split(".")[:2] != torch.split("+")[0].split(".")[:2]:
        yield Finding("torch_npu", torch_npu, f"does not match torch {torch}: install the same release of both")
    else:
        yield Finding("torch_npu", torch_npu or "not installed", "" if torch_npu else advice)
    deepspeed = package_version("deepspeed")
    yield Finding(
        "deepspeed",
        deepspeed or "not installed",
        "" if deepspeed else "only for tensor parallelism: pip install deepspeed",
    )


def _cann() -> Finding:
    version = cann_version()
    if version:
        return Finding("CANN", version)
    return Finding(
        "CANN",
        "not found",
        "for Ascend NPUs: install the CANN toolkit and kernels, then `source …/ascend-toolkit/set_env.sh`",
    )


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
    count = npu.device_count()
    names = ", ".join(npu.get_device_name(index) for index in range(count))
    return Finding(
        "npu", f"{count}: {names}" if count else "none found", "" if count else "check `npu-smi info` and the driver"
    )


def _cuda() -> Finding:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Finding("cuda", f"{count}: {torch.cuda.get_device_name(0)}" if count else "none found")


def _default_device() -> str:
    try:
        return options.default_device()
    except Exception as error:
        return f"unknown ({error!r})"
