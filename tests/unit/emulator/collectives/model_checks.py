"""Collectives inside layers: data parallel training, tensor parallel layers, torch_npu's fused products, GE graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch_npu
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from qwen2_npu.conformance.operators import CATALOGUE, compare
from qwen2_npu.conformance.operators.check import to_array, to_tensors
from qwen2_npu.conformance.operators.mm_all_reduce import golden_of_ranks
from qwen2_npu.emulator.collectives.reduction import OPERATIONS
from qwen2_npu.ops.mm_all_reduce import communicator_name
from tests.unit.emulator.collectives.harness import (
    UNIT,
    check,
    expect,
    npu,
    operand,
    operands,
    rank,
    reduced,
    size,
    slow_check,
)

NPU = torch.device("npu")


@check
def data_parallel_training() -> None:
    """Steps of gradient descent on least squares: the gradient is the mean over all ranks' rows."""
    steps, rows, width = 3, 4, 6
    layer = nn.Linear(width, 2, bias=False).npu()
    weight = operand("weight", (2, width), of=0)
    with torch.no_grad():
        layer.weight.copy_(npu(operand("weight", (2, width))))  # every rank another: DDP takes rank 0's
    model = nn.parallel.DistributedDataParallel(layer, device_ids=[rank()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(npu(operand(f"rows {step}", (rows, width)))).square().mean().backward()
        optimizer.step()
        gradients = [2 / (rows * 2) * (x @ weight.T).T @ x for x in operands(f"rows {step}", (rows, width))]
        weight = weight - 0.1 * np.mean(gradients, axis=0)
    # Each step rounds sums of `rows * width` products, and their mean over the ranks.
    bound = steps * (rows * width + size()) * UNIT[torch.float32] * np.abs(weight).max()
    expect(layer.weight.detach(), weight, torch.float32, bound)


@check
def tensor_parallel_layers() -> None:
    mesh = dist.init_device_mesh("npu", (size(),))
    x, up, down = (operand(name, shape, of=0) for name, shape in (("x", (3, 8)), ("up", (16, 8)), ("down", (4, 16))))
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)).npu()
    with torch.no_grad():
        model[0].weight.copy_(npu(up))
        model[2].weight.copy_(npu(down))
    model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    exact = np.maximum(x @ up.T, 0) @ down.T
    magnitude = (np.abs(x) @ np.abs(up).T) @ np.abs(down).T
    expect(model(npu(x)).detach(), exact, torch.float32, (8 + 16 + size()) * UNIT[torch.float32] * magnitude)


def comm_name() -> str:
    return dist.group.WORLD._get_backend(NPU).get_hccl_comm_name(rank())


@check
def fused_products() -> None:
    name, half = comm_name(), torch.float16
    rows = 2 * size()
    x1, x2, bias = operands("x1", (rows, 8), half), operands("x2", (8, 3), half), operands("bias", (3,), half)
    x3 = operands("x3", (rows, 3), half)
    products = [a @ b + c for a, b, c in zip(x1, x2, bias, strict=True)]
    magnitude = sum(np.abs(a) @ np.abs(b) + np.abs(c) for a, b, c in zip(x1, x2, bias, strict=True))
    noise = (8 + size()) * UNIT[torch.float32] * magnitude
    each = UNIT[half] * sum(np.abs(product) for product in products)
    total = sum(products)
    mine = [npu(values[rank()], half) for values in (x1, x2, bias)]

    result = torch_npu.npu_mm_all_reduce_base(mine[0], mine[1], name, bias=mine[2], x3=npu(x3[rank()], half))
    given = [product + more for product, more in zip(products, x3, strict=True)]
    everything = sum(given)
    bound = noise + each + UNIT[half] * (sum(np.abs(one) for one in given) + np.abs(everything)) * 1.01
    expect(result, everything, half, bound)

    result = torch_npu.npu_mm_reduce_scatter_base(mine[0], mine[1], name, size(), bias=mine[2])
    part = slice(2 * rank(), 2 * rank() + 2)
    expect(result, total[part], half, (noise + each + UNIT[half] * np.abs(total) * 1.01)[part])

    whole = np.concatenate(x1)
    result, gathered = torch_npu.npu_all_gather_base_mm(mine[0], mine[1], name, size(), bias=mine[2])
    exact = whole @ x2[rank()] + bias[rank()]
    expect(gathered, whole, half)
    bound = UNIT[half] * np.abs(exact) + 9 * UNIT[torch.float32] * (np.abs(whole) @ np.abs(x2[rank()]) + 1)
    expect(result, exact, half, bound * 1.01)


@check
def fused_product_is_the_portable_one() -> None:
    """npu_mm_all_reduce_base over HCCL gives the bits of this project's CPU kernel over gloo, and its golden's."""
    on_cpu = dist.new_group(backend="gloo")
    names = [
        communicator_name(group, torch.device(where)) for group, where in ((dist.group.WORLD, "npu"), (on_cpu, "cpu"))
    ]
    record = CATALOGUE["npu_mm_all_reduce_base"]
    for dtype in record.dtypes_on("emulated"):
        every = [record.arguments(PRODUCT, dtype, seed) for seed in range(size())]
        results = [
            torch.ops.npu.npu_mm_all_reduce_base(**{**to_tensors(every[rank()], dtype, where), "hcom": name})
            for where, name in zip(("npu", "cpu"), names, strict=True)
        ]
        assert torch.equal(results[0].cpu(), results[1]), f"{dtype}: NPU {results[0]}, CPU {results[1]}"
        (expected,) = golden_of_ranks(every, dtype)
        assert (problem := compare(expected, to_array(results[1]))) is None, problem


PRODUCT = {"rows": [2, 3], "inner": 64, "columns": 24, "bias": True, "x3": True}


@check
def communicator_of_a_group_of_other_ranks() -> None:
    """Rank 0 of the group is not on card 0: the name must be of this process's card."""
    last = size() - 1
    group = dist.new_group([last])
    x1, x2 = operand("x1", (2, 4), torch.float16, of=last), operand("x2", (4, 3), torch.float16, of=last)
    if rank() == last:
        name = communicator_name(group, torch.device("npu"))
        assert name != communicator_name(dist.group.WORLD, torch.device("npu", rank()))
        mine = npu(x1, torch.float16), npu(x2, torch.float16)
        bound = UNIT[torch.float16] * 1.01 * np.abs(x1) @ np.abs(x2)
        expect(torch_npu.npu_mm_all_reduce_base(*mine, name), x1 @ x2, torch.float16, bound)
    else:
        communicator_name(dist.group.WORLD, torch.device("npu", rank()))


# ---- GE graphs ----


def compiled(function: Callable[..., object], dynamic: bool) -> Callable[..., object]:
    import torchair

    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def same_in_graph(
    function: Callable[..., object], *arguments: torch.Tensor, dynamic: bool = False
) -> list[torch.Tensor]:
    """The results of ``function``, the same to the bit eager and as a GE graph."""
    eager = function(*[argument.clone() for argument in arguments])
    graph = compiled(function, dynamic)(*[argument.clone() for argument in arguments])
    pairs = list(zip(*(result if isinstance(result, tuple) else (result,) for result in (eager, graph)), strict=True))
    for left, right in pairs:
        assert torch.equal(left, right), f"eager gives {left}, the graph {right}"
    return [right for _, right in pairs]


@check
def graph_of_collectives() -> None:
    group = dist.new_group(list(range(size())))
    shape = (2 * size(), 3)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        doubled = x * 2
        total = doubled.clone()
        dist.all_reduce(total)
        most = functional.all_reduce(doubled, "max", group)
        part = functional.reduce_scatter_tensor(total, "sum", 0, group)
        return total, most + 0, part, functional.all_gather_tensor(part, 0, group) + 0

    values = [2 * v for v in operands("graph", shape)]
    total, most, part, again = same_in_graph(step, npu(operand("graph", shape)))
    exact, bound = reduced(values, "sum", torch.float32)
    expect(total, exact, torch.float32, bound)
    expect(most, np.max(values, axis=0), torch.float32)
    rows = slice(2 * rank(), 2 * rank() + 2)
    bound = size() * (bound + 2 * UNIT[torch.float32] * size() * np.abs(exact))
    expect(part, size() * exact[rows], torch.float32, bound[rows])
    expect(again, size() * exact, torch.float32, bound)


@slow_check
def graph_of_every_reduction() -> None:
    group, shape = dist.new_group(list(range(size()))), (2 * size(), 3)
    rows = slice(2 * rank(), 2 * rank() + 2)
    for operation in OPERATIONS:
        name = {"prod": "product"}.get(operation, operation)  # as PyTorch calls it

        def step(x: torch.Tensor, name: str = name) -> tuple[torch.Tensor, ...]:
            whole = functional.all_reduce(x, name, group)
            return whole + 0, functional.reduce_scatter_tensor(x, name, 0, group) + 0

        whole, part = same_in_graph(step, npu(operand(operation, shape)))
        exact, bound = reduced(operands(operation, shape), operation, torch.float32)
        expect(whole, exact, torch.float32, bound)
        expect(part, exact[rows], torch.float32, np.broadcast_to(bound, shape)[rows])


@slow_check
def graph_of_dynamic_shapes() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", dist.group.WORLD) + 0

    run = compiled(step, dynamic=True)
    for rows in (2, 5, 3):
        exact, bound = reduced([2 * v for v in operands("dynamic", (rows, 3))], "sum", torch.float32)
        expect(run(npu(operand("dynamic", (rows, 3)))), exact, torch.float32, bound)


@slow_check
def graph_of_everything_that_moves() -> None:
    sent = [rank() + to + 1 for to in range(size())]
    received = [of + rank() + 1 for of in range(size())]
    heights = [of + 1 for of in range(size())]

    def step(x: torch.Tensor, blocks: torch.Tensor, uneven: torch.Tensor) -> tuple[torch.Tensor, ...]:
        told = x.clone()
        dist.broadcast(told, size() - 1)
        whole = torch.empty(size() * x.shape[0], x.shape[1], device=x.device)
        dist.all_gather_into_tensor(whole, x)
        listed = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(listed, x)
        equal = torch.empty_like(x)
        dist.all_to_all_single(equal, x)
        unequal = functional.all_to_all_single(blocks, received, sent, dist.group.WORLD)
        pieces = [torch.empty(rows, 2, device=x.device) for rows in received]
        dist.all_to_all(pieces, list(blocks.split(sent)))
        gathered = torch.empty(sum(heights), 2, device=x.device)
        torch_npu.distributed.all_gather_into_tensor_uneven(gathered, uneven, heights)
        mine = torch.empty(heights[rank()], 2, device=x.device)
        torch_npu.distributed.reduce_scatter_tensor_uneven(mine, gathered, heights)
        return told, whole, torch.cat(listed), equal, unequal + 0, torch.cat(pieces), gathered, mine

    x, uneven = operand("x", (size(), 3)), operand("uneven", (heights[rank()], 2))
    blocks = np.concatenate([operand(f"to {to}", (rows, 2)) for to, rows in enumerate(sent)])
    results = same_in_graph(step, npu(x), npu(blocks), npu(uneven))
    told, whole, listed, equal, unequal, pieces, gathered, mine = results
    values = operands("x", (size(), 3))
    exchanged = np.concatenate([operand(f"to {rank()}", (rows, 2), of=of) for of, rows in enumerate(received)])
    everything = np.concatenate([operand("uneven", (height, 2), of=of) for of, height in enumerate(heights)])
    expect(told, values[-1], torch.float32)
    expect(whole, np.concatenate(values), torch.float32)
    expect(listed, np.concatenate(values), torch.float32)
    expect(equal, np.stack([v[rank()] for v in values]), torch.float32)
    expect(unequal, exchanged, torch.float32)
    expect(pieces, exchanged, torch.float32)
    expect(gathered, everything, torch.float32)
    begin = sum(heights[: rank()])
    part = everything[begin : begin + heights[rank()]]
    expect(mine, size() * part, torch.float32, size() ** 2 * UNIT[torch.float32] * np.abs(part))


@slow_check
def graph_of_messages() -> None:
    last = size() - 1

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if rank() == 0:
            dist.send(y, last)
        elif rank() == last:
            dist.recv(y, 0)
        return y + 0

    (result,) = same_in_graph(step, npu(operand("message", (2, 3))))
    expect(result, 2 * operand("message", (2, 3), of=0 if rank() == last else rank()), torch.float32)


@slow_check
def graph_of_fused_products() -> None:
    name = communicator_name(dist.group.WORLD, NPU)

    def step(x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor, x3: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch_npu.npu_mm_all_reduce_base(x1, x2, name, bias=bias, x3=x3),
            torch.ops.npu.npu_mm_all_reduce_base(x1, x2.t().contiguous().t(), name),
            torch_npu.npu_mm_reduce_scatter_base(x1, x2, name, size()),
            *torch_npu.npu_all_gather_base_mm(x1, x2, name, size()),
        )

    shapes = {"x1": (2 * size(), 8), "x2": (8, 3), "bias": (3,), "x3": (2 * size(), 3)}
    same_in_graph(step, *[npu(operand(k, v, torch.float16), torch.float16) for k, v in shapes.items()])
