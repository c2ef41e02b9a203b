"""A mixture of experts as a GE graph: the block of Qwen2-57B-A14B at its real dimensions, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu import emulator
from qwen2_npu.conformance.graph.census import Census, take
from qwen2_npu.conformance.graph.lowering import DEVICE, Lowered, lower_call
from qwen2_npu.emulator.ge.engine import listeners
from qwen2_npu.emulator.ge.proto import parse
from tests.graph.counting import GraphCounter
from tests.unit.mixture import REAL, SMALL, Experts, block, dense

Block = Callable[[Tensor, Experts, int], Tensor]

ROUTED = {
    "MoeGatingTopKSoftmax": 1,
    "MoeInitRoutingV3": 1,
    "GroupedMatmul": 2,
    "MoeFinalizeRoutingV2": 1,
}
"""GE operator -> kernels; SwiGLU is counted with the shared expert's."""

SHARED = {"MatMul": 4, "SwiGlu": 2, "Sigmoid": 1, "Mul": 1, "Cast": 1}
"""The router and the shared expert. The Cast is one to the dtype that the Mul has: GE drops it."""


LINEAR_VIEWS = {"Transpose": 3, "Reshape": 1}
"""Of the four nn.Linear weights, which their products fold in; a weight of one row is reshaped."""


def census(rows: int, function: Block = block, shapes: Experts | None = None) -> Census:
    with FakeTensorMode():
        weights = Experts(*(parameter(shape) for shape in shapes or REAL.shapes()))
        x = torch.empty(rows, REAL.hidden, dtype=torch.bfloat16, device=DEVICE)
        raw = lower_call(lambda x: function(x, weights, REAL.top), (x,), dynamic=False)
    frozen = frozenset(index for index, is_parameter in enumerate(raw.parameters) if is_parameter)
    return take(Lowered("decode", rows, 1, 1, parse(raw.proto), frozen, frozenset()))


def parameter(shape: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE), requires_grad=False)


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_it_lowers_to_fourteen_kernels_at_the_real_size(rows: int) -> None:
    """Prefill and decode alike, and no copy of a weight."""
    found = census(rows)
    assert found.operators == ROUTED | SHARED
    assert found.cost.launches == 14
    assert found.views == LINEAR_VIEWS


def test_decode_is_charged_the_experts_it_reads() -> None:
    found = {rows: census(rows).costs["GroupedMatmul"].weight_bytes for rows in (1, 4, 8)}
    expert = 2 * 3 * REAL.hidden * REAL.intermediate
    assert found == {1: 8 * expert, 4: 32 * expert, 8: 64 * expert}


def transposed(x: Tensor, w: Experts, top: int) -> Tensor:
    return block(x, w._replace(gate_up=w.gate_up.mT, down=w.down.mT), top)


def wide(x: Tensor, w: Experts, top: int) -> Tensor:
    return block(x.float(), Experts(*(weight.float() for weight in w)), top)


def test_weights_as_transformers_keeps_them_are_transposed_by_views() -> None:
    """(E, N, K): two more Transpose nodes, which read weights, so that their products may fold them in."""
    shapes = REAL.shapes()
    kept = shapes._replace(gate_up=swapped(shapes.gate_up), down=swapped(shapes.down))
    found = census(4, transposed, kept)
    assert found.operators == ROUTED | SHARED
    assert found.views == LINEAR_VIEWS | {"Transpose": 5}


def swapped(shape: Any) -> Any:
    return (shape[0], shape[2], shape[1])


def test_a_wider_block_is_seen_in_the_census() -> None:
    """The negative control: weights that are copied to another dtype in the graph."""
    found = census(4, wide)
    assert found.operators["Cast"] >= len(Experts._fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_graph_is_what_eager_computes(rows: int, dtype: torch.dtype) -> None:
    with GraphCounter() as counter:
        run, x, weights = compiled_block(rows, dtype)
        for rows_now in (x, -x):  # other experts, the same graph
            assert torch.equal(run(rows_now), block(rows_now, weights, SMALL.top))
    assert (counter.compiled, counter.runs) == (1, 2)
    eager = block(x, weights, SMALL.top)
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(eager.double().cpu(), dense(x, weights, SMALL.top), rtol=tolerance, atol=tolerance)


def test_a_wrong_operator_in_the_graph_is_seen() -> None:
    if not emulator.is_active():
        pytest.skip("nodes are watched on the emulated NPU alone")
    run, x, weights = compiled_block(5, torch.float32)

    def other_experts(node: Any, compute: Any, values: list[Any]) -> Any:
        if node.type == "GroupedMatmul":
            values = [values[0], values[1].flip(0), *values[2:]]
        return compute(values)

    listeners.append(other_experts)
    try:
        assert not torch.allclose(run(x), block(x, weights, SMALL.top), rtol=1e-2, atol=1e-2)
    finally:
        listeners.remove(other_experts)
    assert torch.equal(run(x), block(x, weights, SMALL.top))


def compiled_block(rows: int, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor, Experts]:
    """The small block under torchair, its input and its weights."""
    import torchair

    weights = SMALL.random(dtype, "npu")
    x = torch.randn(rows, SMALL.hidden, generator=torch.Generator().manual_seed(rows)).to("npu", dtype)
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    compiled = torch.compile(lambda x: block(x, weights, SMALL.top), backend=backend, fullgraph=True, dynamic=False)
    return compiled, x, weights
