"""The engine of ``qwen2-npu bench``: latency of any model, step, batch and mode, by the guide's protocol.

Nothing here gates and nothing here prints; ``tests/perf`` is the gate, ``cli/bench.py`` the table.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from qwen2_npu.conformance.hardware import Hardware
from qwen2_npu.conformance.perf import documented, protocol
from qwen2_npu.conformance.perf.builds import Weights, compile_stock
from qwen2_npu.conformance.perf.floor import Work, work
from qwen2_npu.conformance.perf.measurement import Measurement, Summary
from qwen2_npu.conformance.perf.rows import ORIGINAL, Configuration, Phase
from qwen2_npu.graph import compile_model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """One generate call to measure."""

    step: str
    batch: int


@dataclass(frozen=True)
class Result:
    """What a case took; milliseconds. Shares are of a card's roofline, None where none is known for the device.

    Attributes:
        tokens_per_second: decoded, all rows together.
        documented_prefill_ms, documented_decode_ms: what the guide prints for this model, step, batch and kind of mode
            on an Atlas 800I A2, whatever device this is; None where it has no such row.
        predicted: False: these are measurements of ``device``.
    """

    model: str
    weights: str
    step: str
    mode: str
    batch: int
    dtype: str
    device: str
    input_tokens: int
    decode_steps: int
    prefill_ms: float
    decode: Summary
    tokens_per_second: float
    prefill_compute_share: float | None
    decode_memory_share: float | None
    decode_compute_share: float | None
    peak_bytes: int | None
    documented_prefill_ms: float | None
    documented_decode_ms: float | None
    warnings: tuple[str, ...]
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cases(steps: Sequence[str], batches: Sequence[int]) -> list[Case]:
    """Every step with every batch, a step's batches together so that its model is built once."""
    return [Case(step, batch) for step, batch in product(steps, batches)]


def run(
    weights: Weights,
    todo: Sequence[Case],
    *,
    mode: str,
    device: str,
    dtype: torch.dtype,
    input_tokens: int,
    output_tokens: int,
    card: Hardware | None,
    progress: Progress = lambda label, done, total: None,
) -> Iterator[Result]:
    """Measure the cases, one model in memory at a time.

    Args:
        card: whose roofline the shares are of.

    Raises:
        UnsupportedError: a mode that this device or step lacks.
    """
    model, built = None, ""
    for done, case in enumerate(todo):
        progress(f"{case.step}, batch {case.batch}", done, len(todo))
        if case.step != built:
            model = None
            gc.collect()
            model, built = build(weights, case.step, mode, device, dtype), case.step
        measured = protocol.measure(
            model,
            batch=case.batch,
            input_tokens=input_tokens,
            decode_steps=output_tokens - 1,
            weights=weights.description,
        )
        yield _result(weights, case, mode, device, dtype, measured, card)
    progress("done", len(todo), len(todo))


def build(weights: Weights, step: str, mode: str, device: str, dtype: torch.dtype) -> Any:
    """The model of a step, compiled for ``mode``."""
    configuration = Configuration(weights.size.name, 1, 1, "eager", step)
    model = weights.build(configuration, device, dtype)
    if step == ORIGINAL:
        return model if mode == "eager" else compile_stock(model)
    return compile_model(model, mode)


def _result(
    weights: Weights,
    case: Case,
    mode: str,
    device: str,
    dtype: torch.dtype,
    measured: Measurement,
    card: Hardware | None,
) -> Result:
    decode = Summary.of(measured.decode_ms)
    prefill_work = work(weights.size, "prefill", case.batch, measured.input_tokens)
    decode_work = work(weights.size, "decode", case.batch, measured.mean_context)
    return Result(
        model=weights.size.name,
        weights=weights.description,
        step=case.step,
        mode=mode,
        batch=case.batch,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        input_tokens=measured.input_tokens,
        decode_steps=len(measured.decode_ms),
        prefill_ms=measured.prefill_ms,
        decode=decode,
        tokens_per_second=case.batch / decode.mean * 1e3,
        prefill_compute_share=_compute_share(prefill_work, measured.prefill_ms, card),
        decode_memory_share=_memory_share(decode_work, decode.mean, card, dtype),
        decode_compute_share=_compute_share(decode_work, decode.mean, card),
        peak_bytes=measured.peak_bytes,
        documented_prefill_ms=documented_ms(weights.size.name, case, mode, "prefill"),
        documented_decode_ms=documented_ms(weights.size.name, case, mode, "decode"),
        warnings=measured.warnings,
        faults=tuple(measured.faults()),
    )


def _memory_share(need: Work, ms: float, card: Hardware | None, dtype: torch.dtype) -> float | None:
    # ``work`` counts bytes of a 2-byte dtype.
    return None if card is None else need.bytes * dtype.itemsize / 2 / card.memory_bandwidth.value / (ms / 1e3)


def _compute_share(need: Work, ms: float, card: Hardware | None) -> float | None:
    return None if card is None else need.operations / card.bf16_peak.value / (ms / 1e3)


def documented_ms(model: str, case: Case, mode: str, phase: Phase) -> float | None:
    """The guide's number for this model, batch, step and phase; its 图模式 for any compiled mode."""
    kind = "eager" if mode == "eager" else "graph"
    for number in documented.read():
        what = number.row.configuration
        if (what.model, what.cards, what.batch, what.mode, what.step) == (model, 1, case.batch, kind, case.step) and (
            number.row.phase == phase
        ):
            return number.ms
    return None
