#!/usr/bin/env python3
"""``pip install`` that takes PyTorch's CPU build first: PyPI's torch for x86-64 is the CUDA build, 5 GB.

    python scripts/pip_install.py ARGUMENTS…        all arguments are pip's; tox calls it so

The CPU build comes from PyTorch's own index, or from the one in QWEN2_NPU_TORCH_INDEX; wheels that pip is configured to
find (PIP_FIND_LINKS, a mirror) count as well. Where no CPU build can be had pip takes what there is: that works, too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = (sys.executable, "-m", "pip", "install")


def torch_requirement() -> str:
    """The release of torch that pyproject.toml asks for."""
    path = Path(__file__).parents[1] / "pyproject.toml"
    dependencies = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(str(requirement) for requirement in dependencies if requirement.startswith("torch=="))


def main(arguments: list[str]) -> int:
    """Install torch alone, then what was asked for; pip's exit status."""
    if importlib.util.find_spec("torch") is None:
        index = os.environ.get("QWEN2_NPU_TORCH_INDEX") or CPU_INDEX
        # --no-deps: of torch's requirements, pip need not ask that index. A local version (+cpu) sorts before none.
        subprocess.run(
            [*PIP, "--no-deps", "--retries", "1", "--extra-index-url", index, torch_requirement()], check=False
        )
    return subprocess.run([*PIP, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
