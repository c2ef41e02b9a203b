"""The guide's measurement: one generate call as a warm-up, one that is timed, a synchronize around every model call.

The prompt is 1024 random tokens in every row. The guide pads shorter prompts to 1024 and computes the padding like
tokens; this model leaves padding out of its attention, so a padded prompt would be less work here than there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.conformance.machine.host import Host
from qwen2_npu.conformance.machine.timers import StepTimer, timer_for
from qwen2_npu.conformance.perf.measurement import INPUT_TOKENS, OUTPUT_TOKENS, Measurement

TimerFactory = Callable[[str], StepTimer]


def measure(
    model: Any,
    *,
    batch: int,
    input_tokens: int = INPUT_TOKENS,
    decode_steps: int = OUTPUT_TOKENS - 1,
    weights: str = "random",
    timer_for: TimerFactory = timer_for,
) -> Measurement:
    """Time every step of a generate call, after a warm-up call of the same length.

    Args:
        model: the stock model or this project's, compiled or not.
        decode_steps: steps after the first.
        weights: what they are, for the record.
        timer_for: makes the clock for a type of device.

    Raises:
        ValueError: the model has too few positions, or no decode step is asked for.
    """
    if decode_steps < 1:
        raise ValueError(f"decode_steps={decode_steps}: a decode latency is the mean of at least one step")
    check_positions(model.config, input_tokens, decode_steps)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (batch, input_tokens), generator=generator)
    tokens = tokens.to(model.device)
    _generate(model, tokens, decode_steps)
    memory = _memory_of(model.device)
    if memory is not None:
        memory.reset_peak_memory_stats()
    timer, contexts, before = timer_for(model.device.type), list[int](), Host.read()
    with _timed(model, timer, contexts):
        _generate(model, tokens, decode_steps)
    warnings = Host.read().warnings_since(before)
    steps = timer.steps_ms()
    return Measurement(
        prefill_ms=steps[0],
        decode_ms=tuple(steps[1:]),
        wall_ms=tuple(timer.wall_ms()),
        contexts=tuple(contexts),
        input_tokens=input_tokens,
        asked_steps=decode_steps,
        peak_bytes=None if memory is None else _peak_bytes(memory),
        warnings=warnings,
        weights=weights,
    )


def check_positions(config: Any, input_tokens: int, decode_steps: int) -> None:
    """Refuse what is longer than the model; the stock model would compute on, with positions it was never made for.

    The last token is given to nobody: it takes no position.

    Raises:
        ValueError: the model has too few positions.
    """
    needed, positions = input_tokens + decode_steps, config.max_position_embeddings
    if needed > positions:
        raise ValueError(
            f"{input_tokens} tokens and {decode_steps + 1} new ones need {needed} positions, the model has "
            f"max_position_embeddings={positions}: ask for fewer"
        )


def _generate(model: Any, tokens: torch.Tensor, decode_steps: int) -> None:
    """Greedy, to the full length: no token ends it."""
    config = GenerationConfig(
        max_new_tokens=decode_steps + 1, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    # What a passed configuration leaves unset is filled in from the model's own, end-of-sequence tokens included.
    own, model.generation_config = model.generation_config, config
    try:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    finally:
        model.generation_config = own


@contextmanager
def _timed(model: Any, timer: StepTimer, contexts: list[int]) -> Iterator[None]:
    """``timer`` around every call of ``model``, and the length of the cache before it into ``contexts``."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        contexts.append(_cached_tokens(kwargs.get(CACHE_NAME)))
        timer.start()

    def after(module: Any, args: Any, output: Any) -> None:
        timer.stop()

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cached_tokens(cache: Any) -> int:
    if cache is None:
        return 0
    if isinstance(cache, tuple):  # transformers 4.37: (k, v) per layer, BNSD
        return int(cache[0][0].shape[2])
    return int(cache.get_seq_length())


def _peak_bytes(memory: Any) -> int:
    """As asked for by the program; what the allocator rounds up to depends on what it held before."""
    return int(memory.memory_stats()["requested_bytes.all.peak"])


def _memory_of(device: torch.device) -> Any:
    """The module that counts the device's memory, or None."""
    module = getattr(torch, device.type, None)
    return module if device.type != "cpu" and hasattr(module, "max_memory_allocated") else None
