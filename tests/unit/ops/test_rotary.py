"""Rotary embedding: in place in eager, out of place when traced; both modes; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.ops.support import compiled

npu = torch.ops.npu


def inputs(dtype: torch.dtype = torch.float32, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [(2, 3, 4, head_dim), (2, 3, 2, head_dim), (2, 3, 1, head_dim), (2, 3, 1, head_dim)]
    q, k, cos, sin = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, cos, sin


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_eager_writes_in_place_and_returns_its_inputs(dtype: torch.dtype, head_dim: int) -> None:
    q, k, cos, sin = inputs(dtype, head_dim)
    want_q, want_k = rotated(q, cos, sin), rotated(k, cos, sin)
    out_q, out_k = npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout="BSND")
    assert out_q.data_ptr() == q.data_ptr()
    assert out_k.data_ptr() == k.data_ptr()
    assert torch.equal(q, want_q)
    assert torch.equal(k, want_k)


def test_eager_writes_through_a_strided_view() -> None:
    _, _, cos, sin = inputs()
    fused = torch.randn(2, 3, 6, 64)
    want = rotated(fused, cos, sin)
    npu.npu_apply_rotary_pos_emb(fused[:, :, :4], fused[:, :, 4:], cos, sin, layout="BSND")
    assert torch.equal(fused, want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_leaves_its_inputs(backend: str) -> None:
    def function(*tensors: Tensor) -> Any:
        return npu.npu_apply_rotary_pos_emb(*tensors, layout="BSND")

    q, k, cos, sin = inputs()
    before = q.clone(), k.clone()
    fast, counter = compiled(function, backend)
    out_q, out_k = fast(q, k, cos, sin)
    assert counter.frame_count == 1
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    torch.testing.assert_close(out_q, rotated(q, cos, sin))
    torch.testing.assert_close(out_k, rotated(k, cos, sin))


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        q, k, cos, sin = inputs()
        out_q, out_k = npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout="BSND")
        assert (out_q.shape, out_k.shape) == (q.shape, k.shape)
    meta = [tensor.to("meta") for tensor in inputs()]
    assert npu.npu_apply_rotary_pos_emb(*meta, layout="BSND")[0].is_meta


@pytest.mark.parametrize("shape", [(2, 3, 1, 10), (1, 3, 1, 10), (1, 1, 1, 10), (2, 3, 4, 10)])
def test_rotary_mul_broadcasts_out_of_place(shape: tuple[int, ...]) -> None:
    x, cos, sin = torch.randn(2, 3, 4, 10), torch.randn(shape), torch.randn(shape)
    before = x.clone()
    assert torch.equal(npu.npu_rotary_mul(x, cos, sin), rotated(x, cos, sin))
    assert torch.equal(x, before)


def test_rotary_mul_interleaved() -> None:
    x, cos, sin = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 1, 6), torch.randn(2, 3, 1, 6)
    turned = torch.empty_like(x)
    turned[..., 0::2], turned[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    torch.testing.assert_close(npu.npu_rotary_mul(x, cos, sin, "interleave"), x * cos + turned * sin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "BSH"}, "layout is 'BSH'; supported: 'BSND'"),
        ({"rotary_mode": "interleave"}, "rotary_mode is 'interleave'"),
        ({"query": torch.zeros(2, 3, 4, 32)}, "use npu_rotary_mul for other head sizes"),
        ({"query": torch.zeros(2, 3, 256)}, "4 dimensions"),
        ({"query": torch.zeros(2, 3, 4, 64, 1)}, "4 dimensions"),
        *(({"key": torch.zeros(shape)}, "key is") for shape in (
            (2, 4, 2, 64), (2, 2, 2, 64), (1, 3, 2, 64), (3, 3, 2, 64), (2, 3, 2, 128), (2, 3, 2, 32), (2, 3, 64),
            (2, 3, 2, 64, 1),
        )),
        ({"key": torch.zeros(2, 3, 2, 64).half()}, "key is .* the dtype of the first input"),
        ({"cos": torch.zeros(2, 3, 4, 64)}, r"cos is .* \(B, S, 1, D\) = \(2, 3, 1, 64\)"),
        ({"sin": torch.zeros(2, 1, 1, 64)}, "sin is"),
        ({"sin": torch.zeros(3, 3, 1, 64)}, "sin is"),
    ],
)  # fmt: skip
def test_apply_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("query", "key", "cos", "sin"), inputs(), strict=True), layout="BSND")
    with pytest.raises(ValueError, match=f"npu::npu_apply_rotary_pos_emb: .*{message}"):
        npu.npu_apply_rotary_pos_emb(**(arguments | change))


def test_an_input_of_three_dimensions_is_turned_as_one_of_four() -> None:
    x, cos, sin = torch.randn(3, 4, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    assert torch.equal(npu.npu_rotary_mul(x, cos, sin), npu.npu_rotary_mul(x[None], cos[None], sin[None])[0])


@pytest.mark.parametrize(
    ("x", "table", "mode", "message"),
    [
        (torch.zeros(2, 3, 4, 7), torch.zeros(1, 1, 1, 7), "half", "the last even and below 896"),
        (torch.zeros(2, 3, 4, 896), torch.zeros(1, 1, 1, 896), "half", "the last even and below 896"),
        (torch.zeros(3, 8), torch.zeros(1, 8), "half", "3 or 4 dimensions, the last even"),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 1, 1, 1, 8), "half", "3 or 4 dimensions, the last even"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(3, 1, 1, 8), "half", r"broadcasts to the input's, \(2, 3, 4, 8\)"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(1, 8), "half", "broadcasts"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(1, 1), "half", "broadcasts"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(1, 1, 1, 1, 8), "half", "broadcasts"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(1, 1, 1, 8), "quarter", "rotary_mode is 'quarter'"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(1, 1, 1, 8).half(), "half", "r1 is .* the dtype of the first input"),
    ],
)
def test_mul_errors(x: Tensor, table: Tensor, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        npu.npu_rotary_mul(x, table, table, mode)
