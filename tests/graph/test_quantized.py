"""8-bit weights as GE graphs: the products and norms of Qwen2-7B at their real sizes, and their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.conformance.graph.lowering import DEVICE, lower_call
from qwen2_npu.emulator.ge.proto import parse

npu = torch.ops.npu

BF16 = 15
"""torch.bfloat16 in a schema."""


def w8a16(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return npu.npu_weight_quant_batchmatmul(x, weight.mT, scale)


def w8a8_mlp(x: Tensor, residual: Tensor, gamma: Tensor, up: Tensor, scale: Tensor) -> Any:
    q, _, x, token, _ = npu.npu_add_rms_norm_dynamic_quant(x, residual, gamma, epsilon=1e-6)
    y = npu.npu_quant_matmul(q, up.mT, scale, pertoken_scale=token, output_dtype=BF16)
    return (*npu.npu_dynamic_quant(y), x)


def activation(x: Tensor, scale: Tensor, token: Tensor) -> Any:
    return npu.npu_dequant_swiglu_quant(x, weight_scale=scale, activation_scale=token, activate_left=True, quant_mode=1)


def tensors(function: Callable[..., Any], rows: int, hidden: int, inner: int) -> list[Tensor]:
    def int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    def bf16(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    if function is w8a16:
        return [bf16(rows, hidden), int8(inner, hidden), bf16(inner)]
    if function is w8a8_mlp:
        return [bf16(rows, hidden), bf16(rows, hidden), bf16(hidden), int8(inner, hidden), torch.rand(inner)]
    return [torch.randint(-1000, 1000, (rows, inner), dtype=torch.int32), torch.rand(inner) / 1e3, torch.rand(rows)]


OPERATORS = {
    w8a16: {"WeightQuantBatchMatmulV2"},
    w8a8_mlp: {"AddRmsNormDynamicQuant", "QuantBatchMatmulV3", "DynamicQuant"},
    activation: {"DequantSwigluQuant"},
}


@pytest.mark.parametrize("rows", [1, 4, 1024])
@pytest.mark.parametrize("function", OPERATORS)
def test_they_lower_at_the_sizes_of_the_7b(function: Callable[..., Any], rows: int) -> None:
    with FakeTensorMode():
        given = [torch.empty(t.shape, dtype=t.dtype, device=DEVICE) for t in tensors(function, rows, 3584, 37888)]
        raw = lower_call(function, tuple(given), dynamic=False)
    types = [node.type for node in parse(raw.proto)]
    views = {"Data", "NetOutput", "Transpose", "Const", "Cast", "Identity"}
    assert sorted(type_ for type_ in types if type_ not in views) == sorted(OPERATORS[function])


@pytest.mark.parametrize("function", OPERATORS)
def test_the_graph_gives_the_numbers_of_eager_mode(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    given = [t.npu() for t in tensors(function, 3, 64, 96)]
    torch._dynamo.reset()
    import torchair

    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    graph = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*given)
    eager = function(*given)
    for one, other in zip(*((made if isinstance(made, tuple) else (made,)) for made in (graph, eager)), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other.cpu())
