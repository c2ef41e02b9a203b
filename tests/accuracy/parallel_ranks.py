"""What one of two real processes checks: ``torchrun -m tests.accuracy.parallel_ranks DEVICE FOLDER``.

DEVICE is cpu (gloo) or npu (hccl). Writes ``FOLDER/RANK.json``: check -> "" or what went wrong. A process stops at the
first error that is no failed assertion: the other one then finds it gone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qwen2_npu  # noqa: F401 - before torch: the emulated NPU where there is none

import torch  # isort: skip
import torch.distributed as dist

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import stock, teacher_forcing, text
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.compare import compare_traces
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import MODES_OF
from qwen2_npu.parallel.agreement import of_all_ranks
from qwen2_npu.parallel.collectives import current
from tests.accuracy.pairs import TINY
from tests.accuracy.parallel_faults import GRAPH, PARALLEL_FAULTS, UNBROKEN, ParallelFault
from tests.accuracy.sharded import shared

TIMEOUT = timedelta(seconds=300)

GRAPH_MODE = "torchair"
"""In which the faults are met on an NPU; inductor meets them in tests/accuracy/test_tensor_parallel.py."""

DTYPE = {"cpu": "float32", "npu": "float16"}


def main(device: str, folder: str) -> int:
    rank = int(os.environ["LOCAL_RANK"])
    if device == "npu":
        import torch_npu  # noqa: F401 - the device, where it is not loaded with torch

        torch.npu.set_device(rank)
    dist.init_process_group("hccl" if device == "npu" else "gloo", timeout=TIMEOUT)
    found: dict[str, str] = {}
    for name, check in checks(device, f"npu:{rank}" if device == "npu" else "cpu", Path(folder)):
        try:
            torch._dynamo.reset()
            check()
            found[name] = ""
        except AssertionError:
            found[name] = traceback.format_exc()
        except Exception:
            found[name] = traceback.format_exc()
            break
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    return 0


def checks(device: str, card: str, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """In the order they run."""
    dtype = DTYPE[device]
    for mode in MODES_OF[device]:
        yield f"tokens in {mode}", partial(same_tokens, dtype, card, mode)
    yield "sampling", partial(same_samples, dtype, card)
    yield "other prompts", partial(other_prompts_are_refused, dtype, card)
    yield "other checkpoints", partial(other_checkpoints_are_refused, folder)
    if importlib.util.find_spec("deepspeed") is not None:
        yield "AutoTP", partial(autotp_agrees, dtype, card)
    if device == "npu":
        yield "graphs on disk", partial(graphs_on_disk, dtype, card, folder / "graphs")
        yield UNBROKEN.name, partial(fault_in_graph, UNBROKEN, dtype, card)
        for fault in PARALLEL_FAULTS:
            if fault.ranks == dist.get_world_size():
                yield fault.name, partial(fault_in_graph, fault, dtype, card)


def same_tokens(dtype: str, card: str, mode: str) -> None:
    """The tiny checkpoint on two ranks continues texts as it does on one, but where the stock model has a near-tie."""
    pair = shared(TINY, dtype).pair
    batch = Batch.of([pair.encode(prompt) for prompt in tiny.prompts()[:3]], pad_token_id=pair.pad_token_id)

    def greedy(size: int | None, optimizations: Optimizations, mode: str) -> list[list[int]]:
        model = Qwen2ForCausalLM.from_pretrained(
            tiny.path(), dtype=dtype, device=card, optimizations=optimizations, tp_size=size
        )
        assert model.ranks.size == (size or dist.get_world_size())
        model = compile_model(model, mode) if mode != "eager" else model
        return text.greedy(model, batch, max_new_tokens=12, eos_token_ids=(), pad_token_id=pair.pad_token_id)

    alone = greedy(1, Optimizations.all(), "eager")
    for optimizations in (Optimizations.all(), Optimizations.up_to("mm_all_reduce")):
        ours = greedy(None, optimizations, mode)
        found = text.compare_texts(ours, alone, batch, pair.baseline, pair.reference)[0]
        assert all(each.excused for each in found), [each.describe(str) for each in found]


def same_samples(dtype: str, card: str) -> None:
    """Ranks whose generators differ sample the same tokens; what is drawn differs from call to call."""
    model = Qwen2ForCausalLM.from_pretrained(tiny.path(), dtype=dtype, device=card)
    torch.manual_seed(1000 + dist.get_rank())
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device=card)
    drawn = [model.generate(ids, max_new_tokens=24, do_sample=True, temperature=3.0, top_k=0) for _ in range(2)]
    assert not torch.equal(*drawn), "nothing was drawn"
    for own in drawn:
        every = of_all_ranks(own.tolist())
        assert all(each == every[0] for each in every)


def other_prompts_are_refused(dtype: str, card: str) -> None:
    model = Qwen2ForCausalLM.from_pretrained(tiny.path(), dtype=dtype, device=card)
    with pytest.raises(UnsupportedError, match=r"rank 1 has inputs .*: give generate"):
        model.generate(torch.tensor([[5, 6, 7 + dist.get_rank()]], device=card), max_new_tokens=2)


def other_checkpoints_are_refused(folder: Path) -> None:
    """Every rank its copy, of which one has another end of text."""
    own = folder / f"checkpoint-{dist.get_rank()}"
    shutil.copytree(tiny.path(), own)
    if dist.get_rank():
        config = own / "generation_config.json"
        config.write_text(config.read_text().replace("2047", "2046"))
    with pytest.raises(UnsupportedError, match=r"rank 1 has generation_config\.json .*: copy one checkpoint"):
        Qwen2ForCausalLM.from_pretrained(own)


def graphs_on_disk(dtype: str, card: str, folder: Path) -> None:
    """Every rank finds its own again, in a folder that all share."""

    def generated() -> list[list[int]]:
        torch._dynamo.reset()
        model = Qwen2ForCausalLM.from_pretrained(tiny.path(), dtype=dtype, device=card)
        compile_model(model, "torchair", cache_dir=folder)
        ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device=card)
        return list(model.generate(ids, max_new_tokens=12).tolist())

    def graphs() -> dict[str, int]:
        own = f"world{dist.get_world_size()}global_rank{dist.get_rank()}"
        return {str(path): path.stat().st_mtime_ns for path in folder.rglob(f"{own}/*") if path.suffix != ".lock"}

    first, compiled = generated(), graphs()
    assert compiled
    assert (generated(), graphs()) == (first, compiled)


def autotp_agrees(dtype: str, card: str) -> None:
    """The stock model that DeepSpeed cuts and this project's model that ranks share: both by the suite's rule."""
    from qwen2_npu.checkpoint.sources import open_checkpoint
    from qwen2_npu.parallel.stock import filled, hollow, stock_sharded

    subject, ranks, shape = shared(TINY, dtype), current(None, None), "ragged"
    baseline, reference = subject.pair.traces(shape)
    cut = stock_sharded(stock.stock_from_pretrained(tiny.path(), dtype=subject.pair.dtype, device=card), ranks)
    rows = cut.model.layers[0].self_attn.q_proj.weight.shape[0]
    assert rows * ranks.size == subject.state["model.layers.0.self_attn.q_proj.weight"].shape[0], "nothing was cut"
    # Cut without a whole model on any rank, and filled part by part: the same bits.
    source = open_checkpoint(tiny.path())
    config = stock.with_eager_attention(source.config)
    parts = stock_sharded(hollow(stock.uninitialised(config, cut.dtype), cut.dtype, cut.device), ranks)
    wanted, found = dict(cut.named_parameters()), dict(filled(parts, source, ranks).named_parameters())
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    steps = baseline.forced.shape[1]
    theirs = teacher_forcing.run(cut, subject.pair.batch(shape), decode_steps=steps, forced=baseline.forced)
    ours = subject.trace(ranks, Optimizations.none(), shape, device=card)
    for trace in (theirs, ours):
        comparison = compare_traces(trace, baseline, reference, subject.pair.dtype)
        assert comparison.passed, comparison.failures()


def fault_in_graph(fault: ParallelFault, dtype: str, card: str) -> None:
    """Caught in a compiled model, or, where it is one of eager mode alone, not there."""
    subject, ranks, shape = shared("qwen2-7b", dtype), current(None, None), "four"
    baseline, reference = subject.pair.traces(shape)

    def alter(model: Any) -> Any:
        fault.apply(model, subject.state)
        return compile_model(model, GRAPH_MODE)

    trace = subject.trace(ranks, fault.optimizations, shape, alter, card)
    comparison = compare_traces(trace, baseline, reference, subject.pair.dtype)
    wrong = fault is not UNBROKEN and GRAPH in fault.modes
    assert comparison.passed != wrong, comparison.failures() or f"{fault.description}: not noticed"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
