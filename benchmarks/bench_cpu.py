"""Prefill and decode latency on a CPU, side by side in one run: stock transformers against this model.

A randomly initialised Qwen2-0.5B-shaped model, one process, candidates interleaved round by round, so that a slow
minute of the machine hits all of them alike. Every decode latency is also given as a fraction of the bandwidth floor:
the bytes of weights a step must read divided by the read bandwidth probed in the same process. Peak memory is measured
in one process per candidate.

    python benchmarks/bench_cpu.py --dtype float32 --batch 1 --batch 4 --prompt 128 --prompt 1024 --json out.json

With ``--shape mixture`` two layers of a quarter of Qwen2-57B-A14B's width, whose stock model computes its experts by
transformers' default (``grouped_mm``) and, as one more candidate, one after the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from timing import CLOCKS, Clock, seconds  # isort: skip
from transformers import Qwen2Config, StaticCache  # isort: skip

from qwen2_npu import Qwen2ForCausalLM, compile_model
from qwen2_npu.checkpoint.sources import DTYPES
from qwen2_npu.compat import CACHE_NAME, CONFIGURATIONS, cache_of, expert_count
from qwen2_npu.conformance.accuracy.stock import stock_class
from qwen2_npu.conformance.graph.cost import experts_read

CANDIDATES = ("stock eager", "stock StaticCache+compile", "ours eager", "ours inductor")
ONE_BY_ONE = "stock eager, one by one"

SHAPE_05B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXTURE: dict[str, Any] = SHAPE_05B | {
    "vocab_size": 16384, "num_hidden_layers": 2, "num_attention_heads": 14, "num_key_value_heads": 2,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 640, "norm_topk_prob": False,
    "shared_expert_intermediate_size": 5120,
}  # fmt: skip
SHAPES: dict[str, Callable[[], Any]] = {
    "0.5B": lambda: Qwen2Config(**SHAPE_05B),
    "mixture": lambda: CONFIGURATIONS["qwen2_moe"](**MIXTURE),
}


@dataclass
class Cell:
    """One candidate at one (dtype, batch, prompt): latencies in milliseconds."""

    candidate: str
    dtype: str
    batch: int
    prompt: int
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        return statistics.median(self.prefill_ms)

    @property
    def decode(self) -> float:
        return statistics.median(self.decode_ms)


class Runner:
    """One candidate, ready to prefill and decode.

    Args:
        weights: the stock model all candidates share or copy from.
    """

    def __init__(self, candidate: str, stock: Any) -> None:
        self.candidate = candidate
        self.stock = stock
        self.experts = "eager" if candidate == ONE_BY_ONE else "grouped_mm"
        self.decode_call: Callable[..., Any] | None = None
        self.cache: Any = None
        if candidate.startswith("ours"):
            weights = {name: tensor for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
            self.model: Any = Qwen2ForCausalLM.from_state_dict(stock.config, weights)
            compile_model(self.model, "inductor" if candidate.endswith("inductor") else "eager")
        else:
            self.model = stock
            if candidate.endswith("compile"):
                # What generate() compiles with a static cache: the forward pass of one token.
                self.decode_call = torch.compile(stock.forward, fullgraph=True)

    def prefill(self, ids: torch.Tensor, steps: int) -> None:
        """Compute the prompt into a new cache with room for ``steps`` more tokens."""
        batch, tokens = ids.shape
        self.stock.config._experts_implementation = self.experts
        if self.candidate.startswith("ours"):
            if self.cache is None or self.cache.shape.batch_size != batch or self.cache.shape.capacity < tokens + steps:
                self.cache = self.model.allocate_cache(batch, tokens + steps)
            self.cache.reset()
        elif self.candidate.endswith("compile"):
            self.cache = StaticCache(config=self.stock.config, max_cache_len=tokens + steps)
        else:
            self.cache = None
        out = self.model(ids, use_cache=True, **{CACHE_NAME: self.cache}, logits_to_keep=1)
        self.cache = cache_of(out)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Logits of one more token per row."""
        self.stock.config._experts_implementation = self.experts
        call = self.decode_call or self.model
        return call(input_ids=token, use_cache=True, **{CACHE_NAME: self.cache}).logits


def probe_bandwidth() -> float:
    """Read bandwidth in bytes per second: the best of ten sums over 1 GiB."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    best = min(seconds(data.sum) for _ in range(10))
    return data.nbytes / best


def stock_model(dtype: str, shape: str) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    config = SHAPES[shape]()
    model = stock_class(config)(config).eval()
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def weight_bytes_per_step(stock: Any, batch: int) -> float:
    """Bytes a decode step reads: every weight once; a tied embedding serves the head, whose rows are all read. Of
    experts, as many as are to be expected.
    """
    experts = expert_count(stock.config)
    share = experts_read(experts, stock.config.num_experts_per_tok, batch).expected / experts if experts else 1.0
    return sum(p.nbytes * (share if ".experts." in name else 1.0) for name, p in stock.named_parameters())


def measure(cells: list[Cell], runners: dict[str, Runner], rounds: int, steps: int, clock: Clock) -> None:
    """Fill ``cells``, which differ in the candidate only, round by round."""
    batch, prompt = cells[0].batch, cells[0].prompt
    ids = torch.randint(0, 1000, (batch, prompt), generator=torch.Generator().manual_seed(1))
    token = ids[:, :1].contiguous()
    total = steps + 2
    for cell in cells:  # warm-up compiles
        runners[cell.candidate].prefill(ids, total)
        for _ in range(2):
            runners[cell.candidate].decode(token)
    for _ in range(rounds):
        for cell in cells:
            runner = runners[cell.candidate]
            cell.prefill_ms.append(seconds(lambda runner=runner: runner.prefill(ids, total), clock=clock) * 1e3)
            runner.decode(token)
            decode = partial(runner.decode, token)
            cell.decode_ms.extend(seconds(decode, clock=clock) * 1e3 for _ in range(steps))


def peak_memory(candidate: str, shape: str, dtype: str, batch: int, prompt: int) -> int:
    """Peak resident bytes of a fresh process that runs ``candidate`` once, less those of one that only imports."""
    command = [sys.executable, __file__, "--memory-of", candidate, "--shape", shape, "--dtype", dtype]
    command += ["--batch", str(batch), "--prompt", str(prompt)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _run_for_memory(candidate: str, shape: str, dtype: str, batch: int, prompt: int) -> None:
    status = Path("/proc/self/status")

    def resident(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024

    before = resident("VmRSS")
    stock = stock_model(dtype, shape)
    runner = Runner(candidate, stock)
    if candidate.startswith("ours"):
        config = stock.config
        runner.stock = None
        del stock
        runner.stock = SimpleNamespace(config=config)
    # Loading from memory held two models; what counts is running one.
    Path("/proc/self/clear_refs").write_text("5")
    ids = torch.zeros(batch, prompt, dtype=torch.int64)
    runner.prefill(ids, 8)
    for _ in range(4):
        runner.decode(ids[:, :1].contiguous())
    print(resident("VmHWM") - before)


@click.command()
@click.option("--shape", default="0.5B", type=click.Choice(list(SHAPES)))
@click.option(
    "--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], type=click.Choice(["float32", "bfloat16"])
)
@click.option("--batch", "batches", multiple=True, default=[1, 4], type=int)
@click.option("--prompt", "prompts", multiple=True, default=[128, 1024], type=int)
@click.option("--candidate", "candidates", multiple=True, type=click.Choice((*CANDIDATES, ONE_BY_ONE)))
@click.option("--rounds", default=3, help="Rounds over all candidates.")
@click.option("--steps", default=8, help="Decode steps per round.")
@click.option("--threads", default=2)
@click.option("--clock", default="wall", type=click.Choice(list(CLOCKS)), help="cpu: of one thread on a busy machine.")
@click.option("--memory/--no-memory", default=True, help="Also measure peak memory, in one process per candidate.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all samples here.")
@click.option("--memory-of", hidden=True)
@torch.no_grad()
def main(
    shape: str,
    dtypes: tuple[str, ...],
    batches: tuple[int, ...],
    prompts: tuple[int, ...],
    candidates: tuple[str, ...],
    rounds: int,
    steps: int,
    threads: int,
    clock: str,
    memory: bool,
    json_path: Path | None,
    memory_of: str | None,
) -> None:
    """Measure prefill and decode of the stock model and of this one, side by side."""
    torch.set_num_threads(threads)
    if memory_of:
        _run_for_memory(memory_of, shape, dtypes[0], batches[0], prompts[0])
        return
    candidates = candidates or ((*CANDIDATES, ONE_BY_ONE) if shape == "mixture" else CANDIDATES)
    results: list[dict[str, Any]] = []
    for dtype in dtypes:
        stock = stock_model(dtype, shape)
        for batch in batches:
            for prompt in prompts:
                torch._dynamo.reset()
                runners = {candidate: Runner(candidate, stock) for candidate in candidates}
                cells = [Cell(candidate, dtype, batch, prompt) for candidate in candidates]
                bandwidth = probe_bandwidth()
                measure(cells, runners, rounds, steps, CLOCKS[clock])
                bandwidth = max(bandwidth, probe_bandwidth())
                floor_ms = weight_bytes_per_step(stock, batch) / bandwidth * 1e3
                del runners
                peaks = {c.candidate: peak_memory(c.candidate, shape, dtype, batch, prompt) for c in cells if memory}
                _show(cells, floor_ms, bandwidth, peaks)
                results += [
                    asdict(cell)
                    | {"floor_ms": floor_ms, "bandwidth": bandwidth, "peak_bytes": peaks.get(cell.candidate)}
                    for cell in cells
                ]
                if json_path:
                    json_path.write_text(json.dumps(results, indent=1) + "\n")


def _show(cells: list[Cell], floor_ms: float, bandwidth: float, peaks: dict[str, int]) -> None:
    first = cells[0]
    title = f"{first.dtype}, batch {first.batch}, prompt {first.prompt}: "
    title += f"floor {floor_ms:.0f} ms at {bandwidth / 1e9:.1f} GB/s"
    table = Table(title=title)
    for heading in ("candidate", "prefill ms", "× stock", "decode ms", "× stock", "of floor", "peak GB"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for cell in cells:
        peak = peaks.get(cell.candidate)
        table.add_row(
            cell.candidate,
            f"{cell.prefill:.0f}",
            f"{first.prefill / cell.prefill:.2f}",
            f"{cell.decode:.1f}",
            f"{first.decode / cell.decode:.2f}",
            f"{floor_ms / cell.decode:.0%}",
            "–" if peak is None else f"{peak / 1e9:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
