"""The stock model and this one as candidates of one run, on any device: eager, and compiled with a static cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers

from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.conformance.machine.timers import timer_for
from qwen2_npu.conformance.perf.builds import graph_compiler
from qwen2_npu.graph import compile_model
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM

HAS_STATIC_CACHE = int(transformers.__version__.split(".")[0]) >= 5
STOCK = ("stock eager", "stock compiled")
OURS = ("ours eager", "ours compiled")


def why_not(name: str) -> str | None:
    """Why there is no such candidate with the installed transformers; None where there is."""
    if name == "stock compiled" and not HAS_STATIC_CACHE:
        return f"transformers {transformers.__version__} has no static cache to compile with"
    return None


class Candidate:
    """One way to run one set of weights.

    Args:
        name: one of ``STOCK`` or ``OURS``, which must exist (:func:`why_not`).
        stock: the stock model, whose weights ``OURS`` copies.
        batch, prompt: shape of the prompt.
        steps: decode steps of one turn; the turn's duration is their median.
    """

    def __init__(self, name: str, stock: Any, *, batch: int, prompt: int, steps: int) -> None:
        self.name, self.steps = name, steps
        self.capacity = prompt + steps + 1
        self.config = stock.config
        self.model = stock
        self._decode: Callable[..., Any] = stock
        if name in OURS:
            tied = stock.config.tie_word_embeddings
            weights = {n: t for n, t in stock.state_dict().items() if not (tied and n == "lm_head.weight")}
            self.model = Qwen2ForCausalLM.from_state_dict(stock.config, weights, device=stock.device)
            compile_model(self.model, "eager" if name == "ours eager" else graph_compiler(stock.device))
            self._decode = self.model
            self._cache = self.model.allocate_cache(batch, self.capacity)
        elif name == "stock compiled":
            # What generate() does with a static cache: the forward pass of one token is compiled.
            self._decode = torch.compile(stock.forward, fullgraph=True)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, stock.config.vocab_size, (batch, prompt), generator=generator)
        self.tokens = tokens.to(stock.device)

    @torch.no_grad()
    def prefill(self) -> float:
        """Milliseconds of one prompt into an empty cache."""
        self._past = self._empty_cache()
        return self._timed(lambda: self._forward(self.model, self.tokens))

    @torch.no_grad()
    def decode(self) -> float:
        """Milliseconds of one decode step, the median of ``steps``, after a fresh prompt and one step."""
        self._past = self._empty_cache()
        self._forward(self.model, self.tokens)
        token = self.tokens[:, :1].contiguous()
        self._forward(self._decode, token)
        return statistics.median(self._timed(lambda: self._forward(self._decode, token)) for _ in range(self.steps))

    def _forward(self, call: Callable[..., Any], tokens: torch.Tensor) -> None:
        settings = {"logits_to_keep": 1} if HAS_STATIC_CACHE or self.name in OURS else {}
        output = call(input_ids=tokens, use_cache=True, **{CACHE_NAME: self._past}, **settings)
        self._past = cache_of(output)

    def _empty_cache(self) -> Any:
        if self.name in OURS:
            self._cache.reset()
            return self._cache
        if self.name == "stock compiled":
            from transformers import StaticCache

            return StaticCache(config=self.config, max_cache_len=self.capacity)
        return None

    def _timed(self, call: Callable[[], None]) -> float:
        timer = timer_for(self.model.device.type)
        timer.start()
        call()
        timer.stop()
        return timer.steps_ms()[0]
