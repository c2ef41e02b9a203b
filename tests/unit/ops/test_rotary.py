"""Rotary embedding: in place in eager, out of place when traced; both modes; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops.rotary import npu_apply_rotary_pos_emb
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


def test_one_table_serves_every_row() -> None:
    q, k, cos, sin = inputs()
    want = rotated(q, cos[:1], sin[:1]), rotated(k, cos[:1], sin[:1])
    assert all(map(torch.equal, npu.npu_apply_rotary_pos_emb(q, k, cos[:1], sin[:1]), want))


@pytest.mark.parametrize("other", [0, 1], ids=["query", "key"])
def test_a_tensor_of_another_class_is_not_written(other: int) -> None:
    """Nor is the one beside it: what traces has classes of its own."""
    q, k, cos, sin = inputs()
    states = [q.clone(), k.clone()]
    states[other] = states[other].as_subclass(type("Other", (Tensor,), {}))
    turned = npu_apply_rotary_pos_emb(*states, cos, sin)
    for before, state, found in zip((q, k), states, turned, strict=True):
        assert torch.equal(state, before)
        assert torch.equal(found, rotated(before, cos, sin))


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
        ({"query": torch.zeros(2, 3, 4, 64).double()}, "query is .* float32, bfloat16 or float16"),
        *(({name: torch.zeros(2, 3, 1, 64).half()}, f"{name} is .* the dtype of the first") for name in ("cos", "sin")),
        *(({name: torch.zeros(shape)}, rf"{name} is .* \(B, S, 1, D\) = \(2, 3, 1, 64\)")
          for name in ("cos", "sin")
          for shape in ((2, 3, 4, 64), (2, 1, 1, 64), (2, 4, 1, 64), (2, 3, 1, 32), (2, 3, 1, 128), (0, 3, 1, 64),
                        (3, 3, 1, 64), (3, 1, 64), (2, 3, 1, 64, 1))),
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
    ("shape", "taken"),
    [((1, 2, 2), True), ((1, 2, 894), True), ((1, 2, 0), False), ((1, 2, 7), False), ((1, 2, 896), False),
     ((1, 1, 2, 8), True), ((2, 8), False), ((1, 1, 2, 4, 8), False)],
)  # fmt: skip
def test_sizes_that_rotary_mul_takes(shape: tuple[int, ...], taken: bool) -> None:
    x, table = torch.zeros(shape), torch.zeros(*[1] * (len(shape) - 1), shape[-1])
    if taken:
        assert npu.npu_rotary_mul(x, table, table).shape == shape
    else:
        with pytest.raises(ValueError, match=r"input is .*; supported: 3 or 4 dimensions, the last even and below 896"):
            npu.npu_rotary_mul(x, table, table)


@pytest.mark.parametrize("name", ["r1", "r2"])
@pytest.mark.parametrize(
    "shape", [(3, 1, 1, 8), (1, 2, 1, 8), (1, 1, 3, 8), (1, 1, 1, 2), (1, 1, 1, 9), (1, 8), (1, 1), (1, 1, 1, 1, 8)],
    ids=str,
)  # fmt: skip
def test_each_table_of_rotary_mul_broadcasts(name: str, shape: tuple[int, ...]) -> None:
    given = {"r1": torch.zeros(1, 1, 1, 8), "r2": torch.zeros(1, 1, 1, 8), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"npu_rotary_mul: {name} is .* broadcasts to the input's, \(2, 3, 4, 8\)"):
        npu.npu_rotary_mul(torch.zeros(2, 3, 4, 8), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_mode": "quarter"}, "rotary_mode is 'quarter'; supported: 'half' or 'interleave'"),
        ({"rotate": torch.zeros(1)}, "rotate is .*; supported: only the default None"),
        ({"input": torch.zeros(2, 3, 4, 8).double()}, "input is .* float32, bfloat16 or float16"),
        ({"r1": torch.zeros(1, 1, 1, 8).half()}, "r1 is .* the dtype of the first input"),
        ({"r2": torch.zeros(1, 1, 1, 8).half()}, "r2 is .* the dtype of the first input"),
    ],
)
def test_mul_errors(change: dict[str, Any], message: str) -> None:
    table = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match=f"npu_rotary_mul: {message}"):
        npu.npu_rotary_mul(**({"input": torch.zeros(2, 3, 4, 8), "r1": table, "r2": table} | change))
