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

from qwen2_npu.conformance.machine.hardware import Hardware
from qwen2_npu.conformance.machine.memory import free_bytes
from qwen2_npu.conformance.machine.packages import package_version
from qwen2_npu.conformance.perf import documented, protocol
from qwen2_npu.conformance.perf.builds import Weights, check_mode, compile_stock
from qwen2_npu.conformance.perf.documented import Measured
from qwen2_npu.conformance.perf.lower_bound import kv_per_token, work
from qwen2_npu.conformance.perf.measurement import Measurement, Summary
from qwen2_npu.conformance.perf.memory import steps_on
from qwen2_npu.conformance.perf.rank import of_slowest_rank
from qwen2_npu.conformance.perf.rows import Configuration, Mode
from qwen2_npu.conformance.sizes import Size
from qwen2_npu.graph import compile_model
from qwen2_npu.optimizations import ORIGINAL, PHASES, Phase
from qwen2_npu.parallel.sharding import Shard

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setup:
    """What the cases of one run have in common.

    Attributes:
        mode: of ``compile_model``.
        input_tokens: of the prompt, per row.
        output_tokens: new ones, per row.
        cards: that share the model: as many as there are ranks.
    """

    weights: Weights
    mode: str
    device: str
    dtype: torch.dtype
    input_tokens: int
    output_tokens: int
    cards: int = 1

    @property
    def part(self) -> Size:
        """The size of what one card holds."""
        return self.weights.size.shard(self.cards)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class BenchCase:
    """One generate call to measure."""

    step: str
    batch: int


@dataclass(frozen=True)
class BenchResult:
    """What a case took; milliseconds. Shares are of a card's roofline, None where none is known for the device.

    Attributes:
        cards: that shared the model; of every step, the time of the slowest.
        tokens_per_second: decoded, all rows together.
        documented_prefill_ms, documented_decode_ms: what the guide prints for this model, step, batch and kind of mode
            on an Atlas 800I A2, whatever device this is; None where it has no such row, or this may not be held against
            it.
        not_documented: why it may not, where there is such a row.
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
    not_documented: tuple[str, ...]
    warnings: tuple[str, ...]
    faults: tuple[str, ...]
    cards: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cases(steps: Sequence[str], batches: Sequence[int]) -> list[BenchCase]:
    """Every step with every batch, a step's batches together so that its model is built once."""
    return [BenchCase(step, batch) for step, batch in product(steps, batches)]


def check(setup: Setup, todo: Sequence[BenchCase]) -> None:
    """Refuse, before a model is built, whatever can be known not to work.

    Raises:
        UnsupportedError: a mode that this device or a step lacks, or ranks that cannot share the model.
        ValueError: the model has too few positions.
        MemoryError: what must be in memory together does not fit.
        BaselineError: the documented numbers are damaged.
    """
    config = setup.weights.config()
    for case in todo:
        check_mode(setup.mode, torch.device(setup.device), case.step, config)
    Shard(0, setup.cards).check(config)
    protocol.check_positions(config, setup.input_tokens, setup.output_tokens - 1)
    free, together = free_bytes(setup.device), setup.cards if setup.device == "cpu" else 1
    for case in todo:
        needed = least_bytes(setup, case) * together
        if free is not None and needed > free:
            raise MemoryError(
                f"{case.step}, batch {case.batch}, needs {needed / 2**30:.3g} GiB at the least, and {free / 2**30:.3g} "
                f"GiB are free on {setup.device}: take a smaller batch, a shorter prompt, or a smaller model"
            )
    if documented.is_here():
        documented.read()


def least_bytes(setup: Setup, case: BenchCase) -> int:
    """What a case cannot do without on one card: weights, the KV cache, and the scores of small-operator attention
    together with their softmax, which is in float32."""
    size, dtype = setup.part, setup.dtype
    cached = case.batch * (setup.input_tokens + setup.output_tokens - 1) * kv_per_token(size)
    small_operators = "flash_attention" not in steps_on(case.step)
    scores = case.batch * size.heads * setup.input_tokens**2 if small_operators else 0
    # The cache is still empty of new tokens while the prompt's scores are there: the larger of the two counts.
    weights = size.parameters * dtype.itemsize - size.saved_bytes(case.step, dtype.itemsize)
    return weights + max(cached * dtype.itemsize, scores * (dtype.itemsize + 4))


def run(
    setup: Setup,
    todo: Sequence[BenchCase],
    *,
    card: Hardware | None,
    progress: Progress = lambda label, done, total: None,
) -> Iterator[BenchResult]:
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
            model, built = build(setup, case.step), case.step
        measured = protocol.measure(
            model,
            batch=case.batch,
            input_tokens=setup.input_tokens,
            decode_steps=setup.output_tokens - 1,
            weights=setup.weights.description,
        )
        yield _result(setup, case, of_slowest_rank(measured), card)
    progress("done", len(todo), len(todo))


def build(setup: Setup, step: str) -> Any:
    """The model of a step, compiled for the mode."""
    configuration = Configuration(setup.weights.size.name, setup.cards, 1, "eager", step)
    model = setup.weights.build(configuration, setup.device, setup.dtype)
    if step == ORIGINAL:
        return model if setup.mode == "eager" else compile_stock(model, setup.mode)
    return compile_model(model, setup.mode)


def _result(setup: Setup, case: BenchCase, measured: Measurement, card: Hardware | None) -> BenchResult:
    size, decode = setup.weights.size, Summary.of(measured.decode_ms)
    numbers = {phase: documented.find(_measured(setup, case, measured, phase)) for phase in PHASES}
    ms = {phase: None if number is None else number.ms for phase, (number, _) in numbers.items()}
    how: dict[str, Any] = {"step": case.step, "item": setup.dtype.itemsize}
    prefill_work = work(size, "prefill", case.batch, measured.input_tokens, setup.cards, **how)
    decode_work = work(size, "decode", case.batch, measured.mean_context, setup.cards, **how)
    return BenchResult(
        model=size.name,
        weights=setup.weights.description,
        step=case.step,
        mode=setup.mode,
        batch=case.batch,
        dtype=setup.dtype_name,
        device=setup.device,
        input_tokens=measured.input_tokens,
        decode_steps=len(measured.decode_ms),
        prefill_ms=measured.prefill_ms,
        decode=decode,
        tokens_per_second=case.batch / decode.mean * 1e3,
        prefill_compute_share=None if card is None else prefill_work.compute_ms(card) / measured.prefill_ms,
        decode_memory_share=None if card is None else decode_work.memory_ms(card) / decode.mean,
        decode_compute_share=None if card is None else decode_work.compute_ms(card) / decode.mean,
        peak_bytes=measured.peak_bytes,
        documented_prefill_ms=ms["prefill"],
        documented_decode_ms=ms["decode"],
        not_documented=tuple(dict.fromkeys(reason for _, reason in numbers.values() if reason)),
        warnings=measured.warnings,
        faults=tuple(measured.faults()),
        cards=setup.cards,
    )


def _measured(setup: Setup, case: BenchCase, measured: Measurement, phase: Phase) -> Measured:
    """The guide's 图模式 stands for any compiled mode."""
    kind: Mode = "eager" if setup.mode == "eager" else "graph"
    return Measured(
        configuration=Configuration(setup.weights.size.name, setup.cards, case.batch, kind, case.step),
        phase=phase,
        dtype=setup.dtype_name,
        input_tokens=measured.input_tokens,
        decode_steps=measured.asked_steps,
        transformers=str(package_version("transformers")),
    )
