#!/usr/bin/env python3
"""``pip install`` that takes PyTorch's CPU build first: PyPI's torch for x86-64 is the CUDA build, 5 GB.

    python scripts/pip_install.py ARGUMENTS…        all arguments are pip's; tox calls it so

The CPU build comes from PyTorch's own index, or from the one in QWEN2_NPU_TORCH_INDEX; wheels that pip is configured to
find (PIP_FIND_LINKS, a mirror) count as well. Where no CPU build can be had pip takes what there is: that works, too.

uv installs, which takes seconds for what pip takes a minute for, with the indexes, wheels and certificates of pip's
configuration. Where uv cannot be had, or fails, pip itself does.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = (sys.executable, "-m", "pip")

# pip's settings -> uv's. With any that is in none of these sets, pip installs.
OPTIONS = {
    "index-url": "--index-url", "extra-index-url": "--extra-index-url", "find-links": "--find-links",
    "constraint": "--constraint", "trusted-host": "--allow-insecure-host",
}  # fmt: skip
ENVIRONMENT = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}
OF_PIP_ALONE = {
    "cache-dir", "config-file", "disable-pip-version-check", "no-color", "no-input", "progress-bar", "quiet",
    "require-virtualenv", "retries", "root-user-action", "verbose",
}  # fmt: skip
OFF = {"0", "false", "no", "off"}


def torch_requirement() -> str:
    """The release of torch that pyproject.toml asks for."""
    path = Path(__file__).parents[1] / "pyproject.toml"
    dependencies = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(str(requirement) for requirement in dependencies if requirement.startswith("torch=="))


def settings_of_pip() -> dict[str, str]:
    """What files and variables set for ``pip install``, variables last."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found:
            found[section][key] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def find_uv() -> str | None:
    """uv's program: beside this Python, or on the path."""
    return shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def uv_command() -> tuple[list[str], dict[str, str]] | None:
    """``uv pip install`` as pip is configured, and its environment; None where pip must do it."""
    settings = {key: value for key, value in settings_of_pip().items() if value.lower() not in OFF}
    if not settings.keys() <= OPTIONS.keys() | ENVIRONMENT.keys() | OF_PIP_ALONE:
        return None
    if find_uv() is None:
        subprocess.run([*PIP, "install", "--quiet", "uv"], check=False)
    if (program := find_uv()) is None:
        return None
    # As pip does: the best release of all indexes, not that of the first index that has the package.
    command = [program, "pip", "install", "--python", sys.executable, "--index-strategy", "unsafe-best-match"]
    for key, option in OPTIONS.items():
        for value in settings.get(key, "").split():
            command += [option, value]
    return command, {"UV_HTTP_RETRIES": "1"} | {
        variable: settings[key] for key, variable in ENVIRONMENT.items() if key in settings
    } | os.environ


def main(arguments: list[str]) -> int:
    """Install torch alone, then what was asked for; pip's exit status where uv's is not 0."""
    uv = uv_command()

    def succeeds_with_uv(*given: str) -> bool:
        return uv is not None and subprocess.run([*uv[0], *given], env=uv[1], check=False).returncode == 0

    if importlib.util.find_spec("torch") is None:
        index = os.environ.get("QWEN2_NPU_TORCH_INDEX") or CPU_INDEX
        # --no-deps: of torch's requirements, pip need not ask that index. A local version (+cpu) sorts before none.
        alone = ["--no-deps", "--extra-index-url", index, torch_requirement()]
        if not succeeds_with_uv(*alone):
            # uv fails where the index cannot be reached, and a wheel may lie elsewhere.
            if uv is not None:
                print(f"PyTorch's CPU build is looked for without {index}", file=sys.stderr, flush=True)
            if not succeeds_with_uv("--no-deps", f"{torch_requirement()}+cpu"):
                subprocess.run([*PIP, "install", "--retries", "1", *alone], check=False)
    return 0 if succeeds_with_uv(*arguments) else subprocess.run([*PIP, "install", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
