"""Every collective of torch.distributed on npu tensors, against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch_npu

from qwen2_npu.emulator.collectives import library
from tests.unit.emulator.collectives.harness import check, expect, npu, operand, operands, rank, reduced, size

NPU = torch.device("npu")

REDUCED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64)
MOVED = (*REDUCED, torch.float64, torch.uint8, torch.bool, torch.complex64)

OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG,
}

SHAPE = (3, 5)


@check
def group_says_hccl() -> None:
    assert dist.get_backend() == "hccl"
    backend = dist.group.WORLD._get_backend(NPU)
    assert isinstance(backend, torch_npu._C._distributed_c10d.ProcessGroupHCCL)
    names: list[object] = [None] * size()
    dist.all_gather_object(names, backend.get_hccl_comm_name(rank()))
    assert names == ["group_name_0"] * size()


@check
def all_reduce() -> None:
    for dtype in REDUCED:
        for name, operation in OPERATIONS.items():
            if name == "prod" and dtype in (torch.int16, torch.bfloat16):
                continue
            if name == "avg" and not dtype.is_floating_point:
                continue
            x = npu(operand(name, SHAPE, dtype), dtype)
            dist.all_reduce(x, operation)
            expect(x, *_then_dtype(reduced(operands(name, SHAPE, dtype), name, dtype), dtype))


def _then_dtype(exact_and_bound: tuple, dtype: torch.dtype) -> tuple:
    exact, bound = exact_and_bound
    return exact, dtype, bound


@check
def all_reduce_of_bool_and_bytes() -> None:
    x = npu(operand("or", SHAPE, torch.bool), torch.bool)
    dist.all_reduce(x)
    expect(x, np.logical_or.reduce(operands("or", SHAPE, torch.bool)), torch.bool)
    y = npu(operand("bytes", SHAPE, torch.uint8), torch.uint8)
    dist.all_reduce(y)
    expect(y, np.sum(operands("bytes", SHAPE, torch.uint8), axis=0), torch.uint8)


@check
def all_reduce_coalesced() -> None:
    tensors = [npu(operand(f"part {i}", (i + 1, 4))) for i in range(3)]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    for i, tensor in enumerate(tensors):
        expect(tensor, *_then_dtype(reduced(operands(f"part {i}", (i + 1, 4)), "sum", torch.float32), torch.float32))


@check
def broadcast() -> None:
    for root in range(size()):
        for dtype in MOVED:
            x = npu(operand("root", SHAPE, dtype), dtype)
            dist.broadcast(x, root)
            expect(x, operand("root", SHAPE, dtype, of=root), dtype)


@check
def all_gather() -> None:
    for dtype in MOVED:
        x = npu(operand("mine", SHAPE, dtype), dtype)
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x)
        whole = x.new_empty(size() * SHAPE[0], SHAPE[1])
        dist.all_gather_into_tensor(whole, x)
        for part, exact in zip(parts, operands("mine", SHAPE, dtype), strict=True):
            expect(part, exact, dtype)
        expect(whole, np.concatenate(operands("mine", SHAPE, dtype)), dtype)


@check
def all_gather_of_unequal_parts() -> None:
    heights = [of + 1 for of in range(size())]
    exact = [operand("uneven", (height, 2), of=of) for of, height in enumerate(heights)]
    x = npu(exact[rank()])
    parts = [torch.empty(height, 2, device=NPU) for height in heights]
    dist.all_gather(parts, x)
    for part, values in zip(parts, exact, strict=True):
        expect(part, values, torch.float32)
    whole = torch.empty(sum(heights), 2, device=NPU)
    torch_npu.distributed.all_gather_into_tensor_uneven(whole, x, heights)
    expect(whole, np.concatenate(exact), torch.float32)


@check
def reduce_scatter() -> None:
    shape = (2 * size(), 3)
    rows = slice(2 * rank(), 2 * rank() + 2)
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        exact, bound = reduced(operands("rs", shape, dtype), "sum", dtype)
        mine = bound if np.isscalar(bound) else bound[rows]
        x = npu(operand("rs", shape, dtype), dtype)
        whole = x.new_empty(2, 3)
        dist.reduce_scatter_tensor(whole, x)
        expect(whole, exact[rows], dtype, mine)
        listed = x.new_empty(2, 3)
        dist.reduce_scatter(listed, list(x.split(2)))
        expect(listed, exact[rows], dtype, mine)


@check
def reduce_scatter_of_unequal_parts() -> None:
    heights = [of + 1 for of in range(size())]
    exact, bound = reduced(operands("uneven", (sum(heights), 2)), "max", torch.float32)
    result = torch.empty(heights[rank()], 2, device=NPU)
    torch_npu.distributed.reduce_scatter_tensor_uneven(
        result, npu(operand("uneven", (sum(heights), 2))), heights, dist.ReduceOp.MAX
    )
    begin = sum(heights[: rank()])
    expect(result, exact[begin : begin + heights[rank()]], torch.float32, bound)


@check
def all_to_all() -> None:
    # Rank i sends i + j + 1 rows to rank j.
    sent = [rank() + to + 1 for to in range(size())]
    received = [of + rank() + 1 for of in range(size())]
    blocks = [operand(f"to {to}", (rows, 2)) for to, rows in enumerate(sent)]
    exact = [operand(f"to {rank()}", (rows, 2), of=of) for of, rows in enumerate(received)]

    single = torch.empty(sum(received), 2, device=NPU)
    dist.all_to_all_single(single, npu(np.concatenate(blocks)), received, sent)
    expect(single, np.concatenate(exact), torch.float32)

    listed = [torch.empty(rows, 2, device=NPU) for rows in received]
    dist.all_to_all(listed, [npu(block) for block in blocks])
    for part, values in zip(listed, exact, strict=True):
        expect(part, values, torch.float32)

    equal = torch.empty(size(), 2, device=NPU, dtype=torch.bfloat16)
    dist.all_to_all_single(equal, npu(operand("equal", (size(), 2), torch.bfloat16), torch.bfloat16))
    expect(equal, np.stack([v[rank()] for v in operands("equal", (size(), 2), torch.bfloat16)]), torch.bfloat16)

    flat = torch.empty(sum(received) * 2, device=NPU)
    matrix = [[2 * (of + to + 1) for to in range(size())] for of in range(size())]
    torch_npu.distributed.all_to_all_vc(flat, npu(np.concatenate(blocks)).reshape(-1), matrix)
    expect(flat, np.concatenate(exact).reshape(-1), torch.float32)


@check
def to_and_from_one_rank() -> None:
    root = size() - 1
    x = npu(operand("one", SHAPE))
    dist.reduce(x, root)
    if rank() == root:
        expect(x, *_then_dtype(reduced(operands("one", SHAPE), "sum", torch.float32), torch.float32))

    y = npu(operand("gather", SHAPE))
    parts = [torch.empty_like(y) for _ in range(size())] if rank() == root else None
    dist.gather(y, parts, root)
    for part, exact in zip(parts or [], operands("gather", SHAPE), strict=bool(parts)):
        expect(part, exact, torch.float32)

    z = torch.empty(SHAPE, device=NPU)
    dist.scatter(z, [npu(operand(f"for {to}", SHAPE)) for to in range(size())] if rank() == root else None, root)
    expect(z, operand(f"for {rank()}", SHAPE, of=root), torch.float32)


@check
def point_to_point() -> None:
    after, before = (rank() + 1) % size(), (rank() - 1) % size()
    exact = operand("ring", SHAPE, torch.float16, of=before)
    x, y = npu(operand("ring", SHAPE, torch.float16), torch.float16), torch.empty(SHAPE, device=NPU).half()
    if rank() % 2:
        dist.recv(y, before)
        dist.send(x, after)
    else:
        dist.send(x, after)
        dist.recv(y, before)
    expect(y, exact, torch.float16)

    y.zero_()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, y, before), dist.P2POp(dist.isend, x, after)]):
        work.wait()
    expect(y, exact, torch.float16)

    y.zero_()
    sent = dist.isend(x, after)
    assert dist.irecv(y, before).wait()
    assert sent.wait()
    expect(y, exact, torch.float16)


@check
def asynchronous_work() -> None:
    x = npu(operand("async", SHAPE))
    work = dist.all_reduce(x, async_op=True)
    assert work.wait()
    assert work.is_completed()
    exact, bound = reduced(operands("async", SHAPE), "sum", torch.float32)
    expect(x, exact, torch.float32, bound)
    y = npu(operand("async", SHAPE))
    (value,) = dist.all_reduce(y, async_op=True).get_future().wait()
    expect(value, exact, torch.float32, bound)
    dist.barrier()


@check
def subgroups() -> None:
    halves = [dist.new_group(list(range(begin, size(), 2))) for begin in (0, 1)]
    reverse = dist.new_group(list(reversed(range(size()))))
    members = range(rank() % 2, size(), 2)
    x = npu(operand("half", SHAPE))
    dist.all_reduce(x, group=halves[rank() % 2])
    exact = [operand("half", SHAPE, of=of) for of in members]
    expect(x, *_then_dtype(reduced(exact, "sum", torch.float32), torch.float32))
    y = npu(operand("whole", SHAPE))
    dist.all_reduce(y, group=reverse)
    expect(y, *_then_dtype(reduced(operands("whole", SHAPE), "sum", torch.float32), torch.float32))
    assert dist.get_backend(reverse) == "hccl"


@check
def both_backends() -> None:
    group = dist.new_group(backend="cpu:gloo,npu:hccl")
    x, y = npu(operand("both", SHAPE)), torch.from_numpy(operand("both", SHAPE)).float()
    dist.all_reduce(x, group=group)
    dist.all_reduce(y, group=group)
    exact, bound = reduced(operands("both", SHAPE), "sum", torch.float32)
    expect(x, exact, torch.float32, bound)
    expect(y.npu(), exact, torch.float32, bound)


@check
def objects() -> None:
    gathered: list[object] = [None] * size()
    dist.all_gather_object(gathered, {"rank": rank(), "text": "x" * rank()})
    assert gathered == [{"rank": of, "text": "x" * of} for of in range(size())]
    told = [{"from": rank()}, rank()]
    dist.broadcast_object_list(told, src=size() - 1)
    assert told == [{"from": size() - 1}, size() - 1]


@check
def functional_collectives() -> None:
    world = dist.group.WORLD
    shape = (2 * size(), 3)
    values = operands("functional", shape)
    x = npu(operand("functional", shape))
    exact, bound = reduced(values, "sum", torch.float32)
    rows = slice(2 * rank(), 2 * rank() + 2)
    expect(functional.all_reduce(x, "sum", world) + 0, exact, torch.float32, bound)
    expect(functional.all_gather_tensor(x, 0, world) + 0, np.concatenate(values), torch.float32)
    expect(functional.reduce_scatter_tensor(x, "sum", 0, world) + 0, exact[rows], torch.float32, bound[rows])
    exchanged = functional.all_to_all_single(x, None, None, world) + 0
    expect(exchanged, np.concatenate([v[rows] for v in values]), torch.float32)
    expect(functional.broadcast(x, 0, world) + 0, values[0], torch.float32)


@check
def a_recorded_collective_runs_at_replay() -> None:
    """As in a captured graph: nothing is computed while recording, and each replay reads the memory anew."""
    replay: list[Callable[[], None]] = []
    x, received = npu(operand("recorded", SHAPE)), torch.zeros(size(), 2, device=NPU)
    blocks = npu(operand("blocks", (size(), 2)))
    dist.all_reduce(torch.ones(1, device=NPU))
    library.recorder = replay.append
    try:
        dist.all_reduce(x)
        dist.all_to_all_single(received, blocks, [1] * size(), [1] * size())
    finally:
        library.recorder = None
    expect(x, operand("recorded", SHAPE), torch.float32)
    for again in ("first", "second"):
        x.copy_(npu(operand(again, SHAPE)))
        blocks.copy_(npu(operand(again, (size(), 2))))
        for job in replay:
            job()
        expect(x, *_then_dtype(reduced(operands(again, SHAPE), "sum", torch.float32), torch.float32))
        expect(received, np.stack([v[rank()] for v in operands(again, (size(), 2))]), torch.float32)


def refused(call: Callable[[], object], *words: str) -> None:
    """``call`` raises RuntimeError with these words."""
    with pytest.raises(RuntimeError) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing[0]!r} is not in: {raised.value}"


@check
def refusals() -> None:
    """What torch_npu or HCCL refuse on Atlas A2, on every rank before anything is exchanged."""
    x = torch.ones(4, 6, device=NPU)
    refused(lambda: dist.all_reduce(x.double()), "Unsupported data type at::kDouble")
    refused(lambda: dist.all_reduce(x.int(), dist.ReduceOp.BAND), "Cannot use ReduceOp.BAND with HCCL")
    refused(lambda: dist.all_reduce(x[:, :3]), "Tensors must be contiguous")
    refused(lambda: dist.all_reduce(x.cpu()), "No backend type associated with device type cpu")
    refused(
        lambda: dist.all_reduce(x.bfloat16(), dist.ReduceOp.PRODUCT),
        "error code is 5",
        f"RankID:{rank()}",
        "prod of torch.bfloat16 does not exist on Atlas A2",
    )
    refused(
        lambda: torch_npu.npu_mm_all_reduce_base(x.half(), x.half().t().contiguous(), "nobody"),
        "no HCCL communicator is called 'nobody'",
        "group_name_0",
    )
