"""How the kernels reach the dispatcher, alone and beside a torch_npu that already owns the operators."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from qwen2_npu.ops import kernels
from tests.unit.ops.support import SNAPSHOT

BESIDE_ANOTHER_OWNER = """
import pathlib, sys, torch

owner = torch.library.Library("npu", "DEF")
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    if line[0] != "#":
        owner.define(line.removeprefix("npu::"))
owner.impl("npu_swiglu", lambda input, dim=-1: torch.empty_like(input.chunk(2, dim)[0]), "Meta")

import qwen2_npu.ops

has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("npu::npu_swiglu", "CPU") and has("npu::npu_swiglu", "CUDA")
assert not has("npu::npu_swiglu", "CompositeImplicitAutograd")
x = torch.randn(2, 8)
expected = torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
with torch.inference_mode():
    torch.testing.assert_close(torch.ops.npu.npu_swiglu(x), expected)
torch.testing.assert_close(torch.ops.npu.npu_swiglu(x), expected)

def rotate(q, k, cos, sin):
    return torch.ops.npu.npu_apply_rotary_pos_emb(q * 1, k * 1, cos, sin, layout="BSND")

q, cos, sin = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
for ours, want in zip(compiled(q, q, cos, sin), rotate(q, q, cos, sin)):
    torch.testing.assert_close(ours, want)
print("fine")
"""


def test_each_operator_has_one_composite_kernel_or_beside_torch_npu_those_for_cpu_and_cuda() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    beside = "torch_npu" in sys.modules
    for name in kernels:
        assert has(f"npu::{name}", "CompositeImplicitAutograd") is not beside
        for key in ("CPU", "CUDA", "Meta", "PrivateUse1"):  # the last two are torch_npu's own
            assert has(f"npu::{name}", key) is beside


def test_operators_defined_by_somebody_else_get_cpu_and_cuda_kernels_only() -> None:
    result = subprocess.run(
        [sys.executable, "-c", BESIDE_ANOTHER_OWNER, str(SNAPSHOT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},  # torch_npu, where it is installed, is no such owner
    )
    assert result.stdout == "fine\n", result.stderr


if importlib.util.find_spec("torch_npu") is not None:
    # A process of its own takes seconds to start, and beside torch_npu every test of this folder meets such an owner.
    pytest.mark.slow(test_operators_defined_by_somebody_else_get_cpu_and_cuda_kernels_only)


def test_an_unsupported_argument_raises_through_the_dispatcher() -> None:
    x = torch.randn(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"npu::npu_rotary_mul: rotate is a torch.float32 tensor of shape \(2, 4"):
        torch.ops.npu.npu_rotary_mul(x, x, x, rotate=x)


def test_a_default_passed_explicitly_is_accepted_and_an_unknown_argument_is_not() -> None:
    x = torch.randn(2, 4, 2, 8)
    attention = kernels["npu_prompt_flash_attention"]
    attention(x, x, x, num_heads=2, input_layout="BSND", pse_shift=None)
    with pytest.raises(TypeError, match="no argument 'dropout'"):
        attention(x, x, x, num_heads=2, input_layout="BSND", dropout=0)


BYTES, COLUMNS = torch.ones(8, 6, dtype=torch.int8), torch.ones(6)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("linear", [torch.ones(6, 8), COLUMNS]),
        ("linear", [torch.ones(6, 8), None]),
        ("integer_product", [BYTES]),
        ("dequantising_product", [BYTES, COLUMNS, None]),
        ("dequantising_product", [BYTES, COLUMNS, COLUMNS]),
        ("grouped_matmul", [[torch.ones(3, 8, 6)], [], ...]),
        ("grouped_matmul", [[torch.ones(3, 8, 6)], [torch.ones(3, 6)], ...]),
    ],
)
def test_a_traced_graph_is_told_what_an_operator_returns(name: str, others: list[Any], rows: int) -> None:
    """Shape, strides and dtype, of the operators that graphs hold in place of products."""
    if others[-1] is ...:
        others = [*others[:-1], torch.tensor([0, rows, 0]), 1]  # how many rows each group has
    for shape in [(rows, 8), (2, rows, 8)] if name in ("linear", "integer_product") else [(rows, 8)]:
        x = torch.ones(shape, dtype=torch.int8 if name == "integer_product" else torch.float32)
        torch.library.opcheck(getattr(torch.ops.qwen2_npu, name).default, (x, *others), test_utils="test_faketensor")
