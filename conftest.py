"""Options of the suites. Without any, small models and the tiny checkpoint are tested, on an NPU if there is one."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu import emulator
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import EXPERTS, LADDER, QUANTIZED

# Collecting garbage while torch and the tests are imported finds none, and takes seconds; pytest_runtestloop goes on.
gc.disable()

# Downloads are no part of any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before anything imports torch: other conftest files do.
try:
    emulator.activate_where_needed()
except emulator.EmulatorError as error:  # one line; pytest itself would print a traceback
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(pytest.ExitCode.USAGE_ERROR) from None

# --gate, --gate-rows, --update-baselines, --random-weights, and the rows of tests/perf; and what JUnit files say they
# were verified on.
pytest_plugins = ["qwen2_npu.conformance.perf.plugin", "qwen2_npu.conformance.report.junit_plugin"]

DTYPES = ("float32", "bfloat16", "float16")

DECODE_STEPS = 6
"""Decode steps that the accuracy suite compares; the latency suite's own default is the guide's 1023."""

MOST_DECODE_STEPS = 1_000_000
"""More than any model has positions."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qwen2-npu")
    group.addoption(
        "--device",
        metavar="DEVICE",
        help="cpu, npu, emulated, cuda, … (default: npu, emulated where torch_npu finds none, else cpu)",
    )
    group.addoption(
        "--model-path", type=Path, metavar="DIR", help="test a real checkpoint in place of the small models"
    )
    group.addoption(
        "--assume-tp",
        type=int,
        metavar="N",
        help="with --model-path, for a folder that the upstream guide's script merged: its tp_size",
    )
    group.addoption(
        "--stream",
        action="store_const",
        const=True,
        help="tests/accuracy: take the stock model and its float64 self layer by layer (default: where the whole does "
        "not fit the free memory)",
    )
    group.addoption(
        "--no-stream", action="store_const", const=False, dest="stream", help="tests/accuracy: always take them whole"
    )
    group.addoption("--dtype", choices=DTYPES, help="only this dtype (default: all three)")
    group.addoption("--steps", type=_steps, metavar="STEP,…", help="only these steps of the ladder (default: all)")
    group.addoption(
        "--decode-steps",
        type=_decode_steps,
        metavar="N",
        help=f"decode steps compared (default: {DECODE_STEPS}), or timed (default: 1023, as documented)",
    )


_FILES = pytest.StashKey[int]()


def _steps(value: str) -> tuple[str, ...]:
    steps = tuple(step.strip() for step in value.split(",") if step.strip())
    known = LADDER + EXPERTS + QUANTIZED
    if not steps or not set(steps) <= set(known):
        raise pytest.UsageError(f"--steps {value}: the steps of the ladder are {', '.join(known)}")
    return steps


def _refuse_8_bits(option: Any) -> None:
    """Of steps of 8-bit weights, what no test can be run for."""
    if not (asked := ",".join(step for step in option.steps or () if step in QUANTIZED)):
        return
    if option.random_weights is None and option.model_path is None:
        raise pytest.UsageError(f"--steps {asked}: tests/perf times 8-bit weights with --random-weights SIZE")
    if option.random_weights is not None and (why_not := SIZES[option.random_weights].no_8_bits):
        raise pytest.UsageError(f"--steps {asked}: {why_not}")


def _decode_steps(value: str) -> int:
    digits = value.lstrip("0") if value.isascii() and value.isdigit() else ""
    # The length first: Python refuses to convert thousands of digits, with a message of its own.
    if not 1 <= len(digits) <= len(str(MOST_DECODE_STEPS)) or int(digits) > MOST_DECODE_STEPS:
        raise pytest.UsageError(f"--decode-steps {value}: must be a positive integer, at most {MOST_DECODE_STEPS}")
    return int(digits)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """pytest-xdist's workers take runs of neighbours, which share models and imports, unless --dist asks for others."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    from qwen2_npu.cli.options import check_device

    try:
        config.option.device = check_device(config.option.device)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if config.option.assume_tp is not None and config.option.model_path is None:
        raise pytest.UsageError("--assume-tp needs --model-path DIR")
    _refuse_8_bits(config.option)
    config.option.decode_steps_given = config.option.decode_steps
    if config.option.decode_steps is None:
        config.option.decode_steps = DECODE_STEPS
    if config.option.model_path is None and config.option.random_weights is None and not _hands_tests_out(config):
        import torch

        # The small models gain nothing from a second thread, and lose much where another process wants the core.
        torch.set_num_threads(1)


def _hands_tests_out(config: pytest.Config) -> bool:
    """Whether this is pytest-xdist's controller: it runs no test itself, and does without torch."""
    return config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes seconds comes first, so that no worker of pytest-xdist waits for another one's at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow_in_ci") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """What was imported and collected stays: the garbage collector need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(10_000)  # tracing makes many objects that live for as long as the trace
    gc.enable()


FILES_BETWEEN_COLLECTIONS = 40
"""Test files after which the garbage collector looks at everything once more."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What is left after a file mostly stays as well: transformers 4.37.0 collects garbage with every checkpoint it
    reads, and would look at all of it each time."""
    if nextitem is None or nextitem.path != item.path:
        item.config.stash[_FILES] = files = item.config.stash.get(_FILES, 0) + 1
        if files % FILES_BETWEEN_COLLECTIONS == 0:
            gc.unfreeze()
        gc.collect()
        gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    from qwen2_npu.conformance.machine.verified import Verified

    return f"qwen2-npu: device {config.option.device}, verified with {Verified.on(config.option.device)}"


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device under test, as torch names it."""
    return str(pytestconfig.option.device)
