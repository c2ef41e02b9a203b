"""The npu_moe_ operators: ties, finished rows, groups without rows, no dependence on values in their shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.mixture import SMALL, Experts, block, dense
from tests.unit.ops.support import compiled

npu = torch.ops.npu

WIDTH, EXPERTS, TOP = 6, 8, 3


def route(x: Tensor, experts: Tensor, **more: Any) -> tuple[Tensor, ...]:
    given = {"expert_num": EXPERTS, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, **more}
    return npu.npu_moe_init_routing_v2(x, experts, **given)


@pytest.mark.parametrize("rows", [1, 2, 31])
def test_the_chain_is_the_dense_mixture(rows: int) -> None:
    x, weights = torch.randn(rows, SMALL.hidden), SMALL.random(torch.float32)
    torch.testing.assert_close(
        block(x, weights, SMALL.top).double(), dense(x, weights, SMALL.top), rtol=1e-4, atol=1e-5
    )


def test_all_rows_on_the_same_experts() -> None:
    x, weights = torch.rand(5, SMALL.hidden), SMALL.random(torch.float32)
    weights.router[2:5] += 3  # x is positive
    torch.testing.assert_close(
        block(x, weights, SMALL.top).double(), dense(x, weights, SMALL.top), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_whatever_is_routed_where(backend: str) -> None:
    """The group list is data: rows that choose other experts, or all the same ones, use the graph that is there."""
    weights = SMALL.random(torch.float32)
    run, counter = compiled(lambda x: block(x, weights, SMALL.top), backend)
    x = torch.randn(4, SMALL.hidden)
    for rows in (x, -x, x[:1].expand(4, -1).contiguous()):
        with torch.no_grad():
            torch.testing.assert_close(run(rows), block(rows, weights, SMALL.top), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_fake_tensors_have_the_shapes() -> None:
    with FakeTensorMode():
        weights = Experts(*(torch.empty(shape, dtype=torch.bfloat16) for shape in SMALL.shapes()))
        out = block(torch.empty(4, SMALL.hidden, dtype=torch.bfloat16), weights, SMALL.top)
    assert (out.shape, out.dtype) == ((4, SMALL.hidden), torch.bfloat16)


def test_ties_go_to_the_lower_expert() -> None:
    values, experts, numbers = npu.npu_moe_gating_top_k_softmax(torch.zeros(2, 300), None, 5)
    assert experts.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert numbers.tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    torch.testing.assert_close(values, torch.full((2, 5), 1 / 300))
    for made in (values, experts, numbers):  # of their own size, not a view of what every expert has
        assert made.is_contiguous()
        assert made.untyped_storage().nbytes() == made.numel() * made.itemsize


def test_logits_of_16_bits_are_widened() -> None:
    """In the dtype the two largest would be equal, and the lower expert would come first."""
    logits = torch.tensor([[6.0, 6.03125, -6.0]], dtype=torch.bfloat16)
    values, experts, _ = npu.npu_moe_gating_top_k_softmax(logits, None, 2)
    assert experts.tolist() == [[1, 0]]
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, torch.softmax(logits.float(), -1)[:, [1, 0]].bfloat16())


def test_finished_rows_take_part_in_no_group() -> None:
    logits, x = torch.randn(4, EXPERTS), torch.randn(4, WIDTH)
    finished = torch.tensor([False, True, True, False])
    _, experts, _ = npu.npu_moe_gating_top_k_softmax(logits, finished, TOP)
    assert (experts[1:3] == EXPERTS).all()
    _, index, sizes, _ = route(x, experts)
    assert int(sizes.sum()) == 2 * TOP
    assert (index.view(4, TOP) < 0).any(1).tolist() == finished.tolist()


def test_copies_of_one_expert_keep_their_order() -> None:
    x = torch.arange(4.0).view(4, 1)
    experts = torch.tensor([[2, 0], [0, 2], [2, 1], [1, 2]], dtype=torch.int32)
    copies, index, sizes, _ = route(x, experts)
    assert copies.flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert index.tolist() == [4, 0, 1, 5, 6, 2, 3, 7]
    assert sizes.tolist() == [2, 2, 4, 0, 0, 0, 0, 0]
    assert route(x, experts, expert_tokens_num_type=0)[2].tolist() == [2, 4, 8, 8, 8, 8, 8, 8]


def test_the_other_order_of_the_index() -> None:
    """npu_moe_init_routing writes its index by column, npu_moe_init_routing_v2 by row."""
    rows, scales = torch.randn(6, WIDTH), torch.rand(3, 2)
    by_row = torch.randperm(6, dtype=torch.int32)
    by_column = by_row.view(3, 2).t().flatten()
    made = [
        npu.npu_moe_finalize_routing(rows, None, None, None, scales, index, None, drop_pad_mode=mode)
        for index, mode in ((by_row, 2), (by_column, 0))
    ]
    assert torch.equal(*made)


def test_a_row_is_rounded_once() -> None:
    rows = torch.full((2, 1), 1.0, dtype=torch.bfloat16)
    scales = torch.tensor([[2.0**-9, 2.0**-9]])
    skip = torch.ones(1, 1, dtype=torch.bfloat16)
    places = torch.tensor([0, 1], dtype=torch.int32)
    out = npu.npu_moe_finalize_routing(rows, skip, None, None, scales, places, None, 2)
    assert out.item() == 1.0  # 1 + 2^-8 is a tie, which goes to even
    out = npu.npu_moe_finalize_routing(rows, skip, None, None, scales * 1.5, places, None, 2)
    assert out.item() == 1 + 2.0**-7  # each term alone would be lost


def test_errors() -> None:
    x, experts = torch.zeros(3, WIDTH), torch.zeros(3, TOP, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"gating_top_k_softmax: k is 9; supported: 1 to 8: as many as x has experts"):
        npu.npu_moe_gating_top_k_softmax(torch.zeros(2, 8), None, 9)
    with pytest.raises(ValueError, match=r"expert_idx is \[0, 9\]; supported: numbers from 0 to 8: experts"):
        route(x, experts.index_fill(0, torch.tensor([1]), 9))
    with pytest.raises(ValueError, match=r"active_num is 4; supported: -1, 0 or 9, rows · k: all copies"):
        route(x, experts, active_num=4)
    with pytest.raises(ValueError, match="expert_tokens_num_flag is False; supported: True"):
        route(x, experts, expert_tokens_num_flag=False)
    with pytest.raises(ValueError, match="quant_mode is 1; supported: only the default -1"):
        route(x, experts, quant_mode=1)
    places = torch.tensor([0, 3, -1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expanded_src_to_dst_row is \[-1, 3\]; supported: numbers from 0 to 2"):
        npu.npu_moe_finalize_routing(x, None, None, None, None, places, None)
    with pytest.raises(ValueError, match=r"expanded_src_to_dst_row is \[-1, 0\]; supported: numbers from 0 to 2"):
        npu.npu_moe_finalize_routing(x, None, None, None, None, places.clamp(max=0), None)
    with pytest.raises(ValueError, match=r"scales is .*float32 .*; supported: torch.float16, or torch.float32 beside"):
        npu.npu_moe_finalize_routing(x.half(), None, None, None, torch.ones(3, 1), places.clamp(0, 2), None)
