"""What one of two ranks does: ``torchrun -m tests.unit.conformance.accuracy.verify_ranks FOLDER``.

Writes ``FOLDER/RANK.json``: case -> exit status, output, and how many stock models were made. The last case is run as
the command itself would be: it ends the process.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import transformers
from click.testing import CliRunner

from qwen2_npu.cli import main
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import (
    stock,
    streamed_pair,  # noqa: F401 - before stock is patched: what it imports from there stays as it is
)
from qwen2_npu.models.attention import Attention
from qwen2_npu.parallel import agreement, launch

FAILING = "fails"
FAULT = "layer 1, query"
"""Where the fault of the last case is."""


@contextlib.contextmanager
def slow_reference() -> Iterator[None]:
    """Rank 0 computes by itself for longer than ranks may wait for one another."""
    right = stock.exact_reference

    def slow(*arguments: Any) -> Any:
        time.sleep(1.2 * launch.timeout())
        return right(*arguments)

    with patch.object(stock, "exact_reference", slow):
        yield


@contextlib.contextmanager
def wrong_on_the_second(rank: int) -> Iterator[None]:
    """From fused_qkv on, the query heads of the second rank are too large in one layer."""
    right = Attention._project

    def wrong(self: Attention, *given: Any) -> Any:
        query, *others = right(self, *given)
        return [query * 1.5 if rank == 1 and self.layer == 1 and self.optimizations.fused_qkv else query, *others]

    with patch.object(Attention, "_project", wrong):
        yield


@contextlib.contextmanager
def another_checkpoint(rank: int) -> Iterator[None]:
    """The second rank finds other weights in the same folder."""
    right = agreement.fingerprint

    def other(folder: Path) -> dict[str, str]:
        return right(folder) | ({"model.safetensors": "other"} if rank else {})

    with patch.object(agreement, "fingerprint", other):
        yield


def run(folder: Path) -> None:
    made = []
    start = transformers.Qwen2ForCausalLM.__init__

    def counted(self: Any, *arguments: Any, **named: Any) -> None:
        made.append(1)
        start(self, *arguments, **named)

    transformers.Qwen2ForCausalLM.__init__ = counted
    none = contextlib.nullcontext()
    with launch.joined("cpu") as group:
        cases = {
            "whole": ([], slow_reference()),
            "stream": (["--stream"], none),
            "assumed": (["--model-path", str(folder / "guide"), "--assume-tp", "2", "--steps", "swiglu"], none),
            "w8a8": (
                ["--model-path", str(folder / "w8a8"), "--steps", "w8a8", "--against", str(tiny.path())],
                none,
            ),
            "another": (["--model-path", str(tiny.path())], another_checkpoint(group.rank)),
        }
        found: dict[str, Any] = {}
        for name, (options, conditions) in cases.items():
            made.clear()
            with conditions:
                done = CliRunner().invoke(main, arguments(folder, name, *options))
            found[name] = {"status": done.exit_code, "output": done.output, "stock": len(made)}
        (folder / f"{group.rank}.json").write_text(json.dumps(found))
        with wrong_on_the_second(group.rank):
            sys.argv[1:] = arguments(folder, FAILING, "--steps", "fused_qkv")
            main()


def arguments(folder: Path, name: str, *options: str) -> list[str]:
    return ["verify", "--device", "cpu", "--json", str(folder / f"{name}.json"), *options]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
