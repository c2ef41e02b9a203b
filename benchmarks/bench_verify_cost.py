"""What `qwen2-npu verify` of a checkpoint costs on a CPU, by share: forward passes, and CPU-seconds.

python benchmarks/bench_verify_cost.py [--size 1.5B] [--layers 4] [--steps swiglu] [--random-tokens] [--stream]

Random weights of a member's real dimensions (its vocabulary as well, which has a large share in the small members),
bfloat16. Counts and CPU-seconds of one thread say the same on a loaded machine; seconds on the clock would not.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip
from transformers import Qwen2ForCausalLM as StockQwen2  # isort: skip

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import layer_by_layer, pair, stock, verify
from qwen2_npu.conformance.accuracy.configs import random_state_dict
from qwen2_npu.conformance.accuracy.pair import Pair
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM

BATCHES, PERPLEXITY, TEXTS = "batches", "perplexity", "texts"


class Shares:
    """CPU-seconds by part of the comparison and by what was done, each counted once: what a share calls belongs to its
    own share. With them forward passes and the tokens that went through."""

    def __init__(self) -> None:
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.passes: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.tokens: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.part = BATCHES
        self._open = ["the rest"]
        self._since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self.part, self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def share(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    @contextmanager
    def of_part(self, name: str) -> Iterator[None]:
        self._turn()
        before, self.part = self.part, name
        try:
            yield
        finally:
            self._turn()
            self.part = before

    def watch(self, owner: Any, name: str, label: str | Callable[..., str]) -> None:
        """Every call of ``owner.name`` belongs to the share ``label``, which may depend on the arguments."""
        right = getattr(owner, name)

        @functools.wraps(right)
        def watched(*arguments: Any, **named: Any) -> Any:
            share = label if isinstance(label, str) else label(*arguments)
            with self.share(share):
                if name == "forward":
                    given = named.get("input_ids")
                    self.passes[self.part, share] += 1
                    self.tokens[self.part, share] += given.numel() if given is not None else 0
                return right(*arguments, **named)

        setattr(owner, name, watched)

    def watch_part(self, name: str, part: str) -> None:
        right = getattr(Pair, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            with self.of_part(part):
                return right(*arguments, **named)

        setattr(Pair, name, watched)


def write_checkpoint(folder: Path, size: str, layers: int | None, text: bool) -> int:
    """Random weights of a member, bfloat16, and the tiny checkpoint's tokenizer. Returns its parameters."""
    config = SIZES[size].config(layers=layers)
    state = random_state_dict(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json") if text else ():
        (folder / name).write_bytes((tiny.path() / name).read_bytes())
    return sum(tensor.numel() for tensor in state.values())


def watched_shares() -> Shares:
    """Watches what ``verify`` calls, for the rest of the process."""
    shares = Shares()
    shares.watch(Qwen2ForCausalLM, "forward", "optimised model")
    shares.watch(StockQwen2, "forward", lambda model, *_: f"stock model, {model.dtype}".replace("torch.", ""))
    shares.watch(layer_by_layer._Side, "through", "layer by layer")
    shares.watch(layer_by_layer._Side, "finish", "layer by layer")
    shares.watch(layer_by_layer.LayerByLayer, "_parts", "stock models are made")
    shares.watch(Qwen2ForCausalLM, "from_pretrained", "optimised models are made")
    shares.watch(stock, "stock_from_pretrained", "stock models are made")
    shares.watch(stock, "exact_reference", "stock models are made")
    shares.watch(pair, "compare_traces", "numbers are compared")
    shares.watch_part("perplexity", PERPLEXITY)
    shares.watch_part("samples", TEXTS)
    return shares


@click.command()
@click.option(
    "--size", type=click.Choice([name for name in SIZES if "-" not in name]), default="0.5B", show_default=True
)
@click.option("--layers", type=int, help="Fewer layers than the member has.")
@click.option("--steps", help="Rows of the ladder.  [default: all]")
@click.option("--threads", default=1, show_default=True)
@click.option("--random-tokens", is_flag=True, help="Without a tokenizer: no perplexity and no texts.")
@click.option("--stream", is_flag=True, help="The stock model layer by layer.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--model-path", type=click.Path(path_type=Path, exists=True), help="A checkpoint in place of random weights."
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the report of the comparison.")
def main(
    size: str, layers: int | None, steps: str | None, threads: int, random_tokens: bool, stream: bool,
    device: str, model_path: Path | None, report: Path | None,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        if model_path is None:
            model_path = Path(name)
            write_checkpoint(model_path, size, layers, text=not random_tokens)
        shares = watched_shares()
        started = time.process_time()
        result = verify.verify(model_path, device=device, steps=steps and steps.split(","), stream=stream or None)
        total = time.process_time() - started
    if report is not None:
        report.write_text(json.dumps(result.to_dict(), indent=1))
    table = Table(title=f"{model_path}: {total:.0f} CPU-seconds, {'passed' if result.passed else 'FAILED'}")
    for header in ("part", "share", "passes", "tokens", "CPU-seconds", "of all"):
        table.add_column(header, justify="left" if header in ("part", "share") else "right")
    for key, seconds in sorted(shares.seconds.items()):
        if seconds >= 0.005 * total:
            counts = [str(found[key]) if found[key] else "" for found in (shares.passes, shares.tokens)]
            table.add_row(*key, *counts, f"{seconds:.1f}", f"{seconds / total:.0%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
