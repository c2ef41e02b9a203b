"""A model that ranks share agrees with the stock model, and what they can do wrong is seen.

The ranks are threads over gloo, on the CPU (tests/unit/parallel/virtual.py). The rule is that of one card: RMS error at
most 1.5 x that of the stock model in the same dtype. docs/parallel-accuracy.md derives that the sums over ranks fit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, compile_model
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.stock import HEAD_DIM_IS_FREE
from qwen2_npu.optimizations import PARALLEL
from qwen2_npu.parallel.sharding import Shard
from tests.accuracy.pairs import TINY
from tests.accuracy.parallel_faults import EAGER, GRAPH, PARALLEL_FAULTS, UNBROKEN, ParallelFault, thirds
from tests.accuracy.sharded import Shared, shared
from tests.unit.parallel.virtual import Run, virtual_ranks

DTYPES = ("float32", "bfloat16", "float16")
STEPS = (*LADDER, *PARALLEL)
REAL_HEADS = pytest.mark.skipif(
    not HEAD_DIM_IS_FREE, reason="transformers 4.37 ties the head counts to the hidden size"
)
COMPILING = 300.0
"""Seconds that ranks wait for one another where each compiles for itself."""


@pytest.fixture(scope="module")
def two() -> Iterator[Run]:
    with virtual_ranks(2) as run:
        yield run


@pytest.fixture(scope="module")
def four() -> Iterator[Run]:
    with virtual_ranks(4) as run:
        yield run


def cases() -> list[Any]:
    """Every step in every dtype and batch; the default lane runs each step once."""
    default = {(step, DTYPES[i % 3], ("ragged", "one")[i % 2]) for i, step in enumerate(STEPS)}
    return [
        pytest.param(*case, id="-".join(case), marks=() if case in default else pytest.mark.slow)
        for case in ((step, dtype, shape) for step in STEPS for dtype in DTYPES for shape in ("ragged", "one"))
    ]


# ---- right -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("step", "dtype", "shape"), cases())
def test_two_ranks_agree_at_every_position(two: Run, step: str, dtype: str, shape: str) -> None:
    comparison = shared(TINY, dtype).compare(two, Optimizations.up_to(step), shape)
    assert comparison.passed, comparison.failures()


@pytest.mark.slow
def test_without_any_step(two: Run) -> None:
    comparison = shared(TINY, "float32").compare(two, Optimizations.none(), "ragged")
    assert comparison.passed, comparison.failures()


LAYOUTS = [
    # 28/4 at 4; a vocabulary of which every rank has a part, and one that none can cut.
    pytest.param("qwen2-7b", 4, "bfloat16", 512),
    pytest.param("qwen2-7b", 4, "float32", 509, marks=pytest.mark.slow),
    # 12/2 at 4: two ranks hold the same kv head.
    pytest.param("qwen2-1.5b", 4, "bfloat16", 509),
    # 64/8 at 8
    pytest.param("qwen2-72b", 8, "bfloat16", 512, marks=pytest.mark.slow),
    pytest.param("qwen2-72b", 8, "float16", 509, marks=pytest.mark.slow),
    pytest.param("qwen2-0.5b", 2, "float16", 509, marks=pytest.mark.slow),
    pytest.param("qwen2-7b", 2, "bfloat16", 512, marks=pytest.mark.slow),
    pytest.param("qwen2-72b", 4, "float32", 512, marks=pytest.mark.slow),
    # 28/4, and columns of every expert: in float32, where no router has a near-tie.
    pytest.param("qwen2-57b-a14b", 2, "float32", 512),
    pytest.param("qwen2-57b-a14b", 4, "float32", 509, marks=pytest.mark.slow),
]


@REAL_HEADS
@pytest.mark.parametrize(("weights", "count", "dtype", "vocab_size"), LAYOUTS)
def test_real_head_counts(weights: str, count: int, dtype: str, vocab_size: int) -> None:
    """At every position, and in free-running text; the weights have biases, which must be added once."""
    subject = shared(weights, dtype, vocab_size)
    assert subject.state["model.layers.0.self_attn.v_proj.bias"].abs().min() > 0
    with virtual_ranks(count) as run:
        comparison = subject.compare(run, Optimizations.up_to("mm_all_reduce"), "ragged")
        assert comparison.passed, comparison.failures()
        check_greedy(subject, run, Optimizations.up_to("mm_all_reduce"))


def check_greedy(subject: Shared, run: Run, optimizations: Optimizations) -> None:
    """All ranks give the same tokens, and one rank alone the same but where the stock model has a near-tie."""
    pair = subject.pair
    batch = pair.batch("ragged") if pair.tokenizer is None else prompts(subject)

    def greedy(model: Any) -> list[list[int]]:
        return text.greedy(model, batch, max_new_tokens=8, eos_token_ids=(), pad_token_id=0)

    alone = greedy(pair.build(Optimizations.all()))
    every = run(lambda ranks: greedy(subject.build(ranks, optimizations)))
    assert all(each == every[0] for each in every)
    found = text.compare_texts(every[0], alone, batch, pair.baseline, pair.reference)[0]
    assert all(divergence.excused for divergence in found), [divergence.describe(str) for divergence in found]


def prompts(subject: Shared) -> Batch:
    return Batch.of([subject.pair.encode(prompt) for prompt in tiny.prompts()[:4]], pad_token_id=0)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_ranks_continue_texts_as_one(two: Run, dtype: str) -> None:
    check_greedy(shared(TINY, dtype), two, Optimizations.up_to("mm_all_reduce"))


# ---- wrong -----------------------------------------------------------------------------------------------------------
def fault_comparison(fault: ParallelFault, run: Run, mode: str) -> Any:
    """The 7B's head layout in float32, four prompts of 17 tokens and the tokens after them."""
    subject = shared("qwen2-7b", "float32")

    def alter(model: Any) -> Any:
        fault.apply(model, subject.state)
        return compile_model(model, "inductor") if mode == GRAPH else model

    return subject.compare(run, fault.optimizations, "four", alter)


@REAL_HEADS
@pytest.mark.parametrize("fault", PARALLEL_FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught_in_eager_mode(fault: ParallelFault, two: Run, four: Run) -> None:
    assert EAGER in fault.modes
    comparison = fault_comparison(fault, {2: two, 4: four}[fault.ranks], EAGER)
    assert not comparison.passed, f"{fault.description}: not noticed"


@REAL_HEADS
def test_nothing_is_caught_where_nothing_is_wrong(two: Run) -> None:
    comparison = fault_comparison(UNBROKEN, two, EAGER)
    assert comparison.passed, comparison.failures()


@pytest.mark.slow
@REAL_HEADS
@pytest.mark.parametrize("fault", [UNBROKEN, *PARALLEL_FAULTS], ids=lambda fault: fault.name)
def test_fault_in_graph_mode(fault: ParallelFault) -> None:
    """Caught, or, where it is one of eager mode alone, not there."""
    torch._dynamo.reset()
    with virtual_ranks(fault.ranks, timeout=COMPILING) as run:
        comparison = fault_comparison(fault, run, GRAPH)
    wrong = fault is not UNBROKEN and GRAPH in fault.modes
    assert comparison.passed != wrong, comparison.failures() or f"{fault.description}: not noticed"


def test_faults_are_well_formed() -> None:
    assert len({fault.name for fault in PARALLEL_FAULTS}) == len(PARALLEL_FAULTS)
    assert all((fault.layout is None) != (fault.patch is None) for fault in PARALLEL_FAULTS)


@pytest.mark.slow
@REAL_HEADS
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_thirds_are_what_deepspeed_cuts(kind: str) -> None:
    """AutoTP takes a layer class of the name DecoderLayer for one of GLM."""
    fused = pytest.importorskip("deepspeed.module_inject.fusedqkv_utils", reason="deepspeed is not installed")
    shards = pytest.importorskip("deepspeed.module_inject.tp_shard")
    subject = shared("qwen2-7b", "float32")
    scope = "model.layers.1.self_attn"
    whole = [subject.state[f"{scope}.{part}_proj.{kind}"] for part in "qkv"]
    meta = shards.AutoTPMeta.from_model_config(subject.config)
    model = subject.pair.build(Optimizations.up_to("fused_qkv"))
    for rank in range(2):
        cut = fused.prepare_tp_fused_qkvw(model.model.layers[1], torch.cat(whole), 2, rank, meta)
        assert torch.equal(cut, thirds(whole, Shard(rank, 2), subject.config))
