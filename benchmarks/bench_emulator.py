"""What the emulated NPU costs over the CPU it computes on: microseconds per operator, and a decode step.

python benchmarks/bench_emulator.py [--threads 1] [--layers 4]

The decode step is Qwen2-0.5B's (hidden 896, 14 heads of which 2 for keys, intermediate 4864) with fewer layers and a
small vocabulary: the stock model and this project's, one token after 64, alternating between the devices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

from qwen2_npu import emulator

emulator.activate()

import torch  # noqa: E402
from timing import medians, seconds  # noqa: E402

from qwen2_npu import Optimizations, Qwen2ForCausalLM  # noqa: E402
from qwen2_npu.compat import CACHE_NAME, cache_of  # noqa: E402

DEVICES = ("cpu", "npu")
PREFIX = 64
ROUNDS = 30
LIMIT = 2.0
"""How many times the CPU's decode step the emulated one may take."""


def per_call(call: Callable[[], object], calls: int = 200, rounds: int = 40) -> float:
    """Microseconds: the fastest round's mean."""
    return min(seconds(call, calls) for _ in range(rounds)) * 1e6


def operators() -> Iterator[tuple[str, list[float]]]:
    """Name and microseconds on CPU and NPU, on tensors of four elements: all overhead."""
    x = {device: torch.ones(4, device=device) for device in DEVICES}
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "add": lambda t: t + t,
        "mul_ (in place)": lambda t: t.mul_(1.0),
        "sum": lambda t: t.sum(),
        "view": lambda t: t.view(2, 2),
        "cat": lambda t: torch.cat([t, t]),
        "item": lambda t: t[0].item(),
    }
    for name, call in calls.items():
        yield name, [per_call(lambda: call(x[device])) for device in DEVICES]  # noqa: B023  # called at once


def config(layers: int) -> object:
    from transformers import Qwen2Config

    found = Qwen2Config(
        vocab_size=1000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    found._attn_implementation = "eager"
    return found


def steps(layers: int, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Name and, per device, one decode step."""
    from transformers import Qwen2ForCausalLM as Stock

    ids = torch.arange(PREFIX).view(1, -1) % 1000

    def stock(device: str) -> Callable[[], object]:
        torch.manual_seed(0)
        model = Stock(config(layers)).to(dtype).to(device).eval()
        cache = cache_of(model(ids.to(device), use_cache=True))
        token = ids[:, :1].to(device)

        def step() -> object:
            logits = model(token, use_cache=True, **{CACHE_NAME: cache}).logits
            cache.crop(-1)
            return logits.argmax(-1).item()

        return step

    def ours(device: str) -> Callable[[], object]:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config(layers), optimizations=Optimizations.all()).to(dtype).to(device).eval()
        prompt = ids.to(device)

        def step() -> object:
            return model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)

        return step

    yield "stock, one decode step", {device: stock(device) for device in DEVICES}
    yield "qwen2_npu, prefill and eight decode steps", {device: ours(device) for device in DEVICES}


@torch.no_grad()
def main() -> int:
    """Print the numbers; the exit status says whether every decode step is within the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, (cpu, npu) in operators():
        print(f"{name:16} cpu {cpu:6.1f} µs   npu {npu:6.1f} µs   +{npu - cpu:.1f} µs")
    within = True
    for dtype in (torch.float32, torch.bfloat16):
        for name, calls in steps(arguments.layers, dtype):
            found = {device: s * 1e3 for device, s in medians(calls, ROUNDS, warm_up=3).items()}
            ratio = found["npu"] / found["cpu"]
            within &= ratio <= LIMIT
            print(f"{name}, {dtype}: cpu {found['cpu']:.2f} ms   npu {found['npu']:.2f} ms   ratio {ratio:.2f}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
