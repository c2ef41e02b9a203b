"""pytest in a process of its own, on the real tests/perf/test_latency.py, with the stand-in as the machine.

The processes are forked from one that has already imported pytest and the plugins: starting Python anew would take
most of the time of a hundred sessions.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
LATENCY = "tests/perf/test_latency.py"

PLUGINS = ("pytest_benchmark.plugin", "qwen2_npu.conformance.perf.plugin", "tests.perf.fake_runner")


@dataclass(frozen=True)
class Result:
    """``failed``: JUnit's names and messages of what failed; ``passed`` and ``skipped``: its counts."""

    status: int
    output: str
    failed: dict[str, str]
    passed: int
    skipped: int


def run_pytest(
    tmp_path: Path,
    *arguments: str,
    fake_runner: dict[str, Any] | None = None,
    plugins: tuple[str, ...] = (),
    tests: str = LATENCY,
    folder: Path = REPOSITORY,
) -> Result:
    """Run pytest without the root conftest.py, which imports torch.

    Args:
        fake_runner: settings of the stand-in; see there.
        tests: what is collected.
        folder: working directory, and so rootdir.
    """
    junit, output = tmp_path / "junit.xml", tmp_path / "output.txt"
    junit.unlink(missing_ok=True)
    command = ["--noconftest", "-p", "no:cacheprovider", "-q", "--benchmark-quiet", f"--junitxml={junit}", tests]
    for plugin in (*PLUGINS, *plugins):
        command += ["-p", plugin]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "FAKE_RUNNER": json.dumps(fake_runner or {}),
        "PYTHONPATH": str(REPOSITORY),  # for xdist's workers
        "COLUMNS": "200",
    }
    request = {
        "arguments": [*command, *arguments],
        "environment": environment,
        "folder": str(folder),
        "output": str(output),
    }
    status = _ask(request)
    failed, passed, skipped = _junit(junit)
    return Result(status, output.read_text(encoding="utf-8"), failed, passed, skipped)


def _junit(path: Path) -> tuple[dict[str, str], int, int]:
    if not path.exists():
        return {}, 0, 0
    failed: dict[str, str] = {}
    passed = skipped = 0
    for case in ElementTree.parse(path).iter("testcase"):
        bad = [*case.iter("failure"), *case.iter("error")]
        if bad:
            failed[str(case.get("name"))] = "\n".join(f"{problem.get('message')}\n{problem.text}" for problem in bad)
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return failed, passed, skipped


# ---- the process the sessions are forked from -----------------------------------------------------------------------
@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, when its standard input closes."""
    command = [sys.executable, "-c", "from tests.perf import subprocesses; subprocesses.serve()"]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(request: dict[str, Any]) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def serve() -> None:
    """Fork a session per line of standard input; answer with its exit status."""
    import importlib

    for name in ("pytest", *PLUGINS):
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os._exit(_session(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _session(request: dict[str, Any]) -> int:
    import pytest

    with open(request["output"], "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    status = int(pytest.main(request["arguments"]))
    sys.stdout.flush()
    sys.stderr.flush()
    return status
