"""Layouts: which shapes fit each other and the limits of the devices, and what comes back in which order."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops.attention.layouts import (
    LAYOUTS,
    Geometry,
    check_contiguous,
    check_geometry,
    from_heads_first,
    heads_first,
)

B, NQ, NKV, SQ, SKV, D = 2, 6, 3, 5, 9, 4
SHAPES = {
    "BSH": ((B, SQ, NQ * D), (B, SKV, NKV * D)),
    "BSND": ((B, SQ, NQ, D), (B, SKV, NKV, D)),
    "BNSD": ((B, NQ, SQ, D), (B, NKV, SKV, D)),
    "BNSD_BSND": ((B, NQ, SQ, D), (B, NKV, SKV, D)),
}


def geometry(
    layout: str,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Geometry:
    tensors = (torch.empty(shape, device="meta", dtype=dtype) for shape in (query, key, value or key))
    given = {"num_heads": NQ, "num_key_value_heads": NKV, "max_batch": 65536, "supported_layouts": tuple(LAYOUTS)}
    return check_geometry("npu_x", *tensors, layout=layout, **(given | more))


def refused(argument: str, supported: str) -> AbstractContextManager[Any]:
    return pytest.raises(ValueError, match=rf"^npu::npu_x: {argument} is .*; supported: {re.escape(supported)}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_of_every_layout(layout: str) -> None:
    assert geometry(layout, *SHAPES[layout]) == (layout, B, NQ, NKV, SQ, SKV, D)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["query", "key", "value"])
@pytest.mark.parametrize("change", [-1, 1])
def test_each_tensor_has_the_rank_of_the_layout(layout: str, argument: str, change: int) -> None:
    query, key = SHAPES[layout]
    given = {"query": query, "key": key, "value": key}
    given[argument] = given[argument][:-1] if change < 0 else (*given[argument], 1)
    with refused(argument, f"{len(query)} dimensions in layout {layout}"):
        geometry(layout, **given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["key", "value"])
@pytest.mark.parametrize("change", [-1, 1])
def test_keys_and_values_have_the_shape_that_the_query_asks_for(layout: str, argument: str, change: int) -> None:
    """In every dimension; the length is that of the keys."""
    query, key = SHAPES[layout]
    length = LAYOUTS[layout][1]
    for axis in range(len(key)):
        if (argument, axis) == ("key", length):
            continue
        other = tuple(size + change * (at == axis) for at, size in enumerate(key))
        with refused(argument, f"shape {key} ({layout}, num_key_value_heads={NKV})"):
            geometry(layout, query, **({"key": key, "value": key} | {argument: other}))


@pytest.mark.parametrize("change", [-1, 1])
def test_the_query_has_the_heads_that_are_named(change: int) -> None:
    with refused("query", f"a last dimension that num_heads={NQ} divides"):
        geometry("BSH", (B, SQ, NQ * D + change), (B, SKV, NKV * D))
    for layout, axis in (("BSND", 2), ("BNSD", 1), ("BNSD_BSND", 1)):
        query, key = SHAPES[layout]
        other = tuple(size + change * (at == axis) for at, size in enumerate(query))
        with refused("query", f"num_heads={NQ} heads at axis {axis} ({layout})"):
            geometry(layout, other, key)


@pytest.mark.parametrize(
    ("heads", "given", "kv_heads"), [(1, 1, 1), (1, 0, 1), (6, 0, 6), (6, 6, 6), (64, 1, 1), (256, 4, 4)]
)
def test_heads_of_keys_divide_those_of_queries_or_are_as_many(heads: int, given: int, kv_heads: int) -> None:
    found = geometry("BSND", (1, 1, heads, D), (1, 1, kv_heads, D), num_heads=heads, num_key_value_heads=given)
    assert (found.q_heads, found.kv_heads) == (heads, kv_heads)


@pytest.mark.parametrize(("heads", "given"), [(6, 4), (6, 12), (65, 1), (256, 2), (6, -1), (6, -3)])
def test_other_heads_of_keys_are_refused(heads: int, given: int) -> None:
    wanted = f"0 (as num_heads) or a divisor of num_heads={heads}, at most 64 times smaller"
    with refused("num_key_value_heads", wanted):
        geometry("BSND", (1, 1, heads, D), (1, 1, abs(given), D), num_heads=heads, num_key_value_heads=given)


LIMITS: list[tuple[str, tuple[int, int, int], torch.dtype, int, str]] = [
    # layout, (batch, heads, head size), dtype, max_batch, what is supported where it is refused
    ("BSND", (1, 1, 1), torch.float32, 65536, ""),
    ("BSND", (1, 256, 1), torch.float32, 65536, ""),
    ("BSND", (1, 1, 0), torch.float32, 65536, "a head size of 1 to 512"),
    ("BSND", (1, 1, 512), torch.float32, 65536, ""),
    ("BSND", (1, 1, 513), torch.float32, 65536, "a head size of 1 to 512"),
    # 65,534 = 2 · 7 · 31 · 151, 65,535 = 3 · 5 · 17 · 257
    *((layout, (1, 217, 302), torch.float16, 65536, "") for layout in ("BSH", "BSND", "BNSD", "BNSD_BSND")),
    *((layout, (1, 255, 257), torch.float16, 65536, f"num_heads · head size below 65535 in layout {layout}")
      for layout in ("BSH", "BSND")),
    *((layout, (1, 255, 257), torch.float16, 65536, "") for layout in ("BNSD", "BNSD_BSND")),
    # A head is aligned where its bytes are a multiple of 32.
    ("BSND", (128, 2, 15), torch.float32, 65536, ""),
    ("BSND", (129, 2, 15), torch.float32, 65536, "a batch of at most 128"),
    ("BSND", (129, 2, 8), torch.float16, 65536, "a batch of at most 128"),
    ("BSND", (129, 2, 16), torch.float16, 65536, ""),
    ("BSND", (256, 2, 8), torch.float32, 256, ""),
    ("BSND", (257, 2, 8), torch.float32, 256, "a batch of at most 256"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "sizes", "dtype", "max_batch", "supported"), LIMITS, ids=str)
def test_limits(layout: str, sizes: tuple[int, int, int], dtype: torch.dtype, max_batch: int, supported: str) -> None:
    """The first value beyond, and the last that is taken."""
    batch, heads, size = sizes
    shape = {"BSH": (batch, 1, heads * size), "BSND": (batch, 1, heads, size)}.get(layout, (batch, heads, 1, size))
    with refused("query", supported) if supported else nullcontext():
        geometry(layout, shape, shape, dtype=dtype, num_heads=heads, num_key_value_heads=0, max_batch=max_batch)


@pytest.mark.parametrize(("heads", "taken"), [(0, False), (-1, False), (1, True), (256, True), (257, False)])
def test_numbers_of_heads(heads: int, taken: bool) -> None:
    shape = (1, 1, max(heads, 1), D)
    with nullcontext() if taken else refused("num_heads", "1 to 256"):
        geometry("BSND", shape, shape, num_heads=heads, num_key_value_heads=0)


def test_only_the_layouts_of_the_operator() -> None:
    with refused("input_layout", "BSH, BSND"):
        geometry("BNSD", *SHAPES["BNSD"], supported_layouts=("BSH", "BSND"))


@pytest.mark.parametrize("strided", ["query", "key", "value"])
def test_each_tensor_is_contiguous_where_it_has_memory(strided: str) -> None:
    whole, other = torch.zeros(2, 3), torch.zeros(3, 2).t()
    check_contiguous("npu_x", query=whole, key=whole, value=whole)
    given = {name: other if name == strided else whole for name in ("query", "key", "value")}
    with refused(strided, "contiguous memory, not strides (1, 2); call .contiguous()"):
        check_contiguous("npu_x", **given)
    check_contiguous("npu_x", **{name: tensor.to("meta") for name, tensor in given.items()})
    with FakeTensorMode():
        check_contiguous("npu_x", query=torch.zeros(3, 2).t())


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_first_is_a_view_and_the_way_back_is_contiguous(layout: str) -> None:
    """BNSD_BSND is read in the one order and written in the other."""
    tensor = numbered(*SHAPES[layout][0])
    view = heads_first(tensor, layout, NQ)
    assert view.shape == (B, NQ, SQ, D)
    assert view.data_ptr() == tensor.data_ptr()
    for batch, head, row in ((0, 0, 0), (1, 2, 3), (1, 5, 4)):
        before = (batch * SQ + row) * NQ + head if layout in ("BSH", "BSND") else (batch * NQ + head) * SQ + row
        assert view[batch, head, row].tolist() == list(range(D * before, D * before + D))
    back = from_heads_first(view, layout)
    assert back.is_contiguous()
    assert torch.equal(back, tensor.permute(0, 2, 1, 3) if layout == "BNSD_BSND" else tensor)
