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


@pytest.mark.parametrize("k", [1, 3, EXPERTS])
def test_positions_of_three_dimensions_are_rows_of_two(k: int) -> None:
    logits, finished = torch.randn(2, 5, EXPERTS), torch.rand(2, 5) > 0.5
    flat = npu.npu_moe_gating_top_k_softmax(logits.flatten(0, 1), finished.flatten(), k)
    for made, rows in zip(npu.npu_moe_gating_top_k_softmax(logits, finished, k), flat, strict=True):
        assert torch.equal(made, rows.view(2, 5, k))
    values, experts, numbers = npu.npu_moe_gating_top_k_softmax(logits)
    assert torch.equal(values, torch.softmax(logits, -1).amax(-1, keepdim=True))
    assert torch.equal(experts, logits.argmax(-1, keepdim=True).int())
    assert numbers.flatten().tolist() == list(range(10))


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


@pytest.mark.parametrize("active", [[], [0, EXPERTS], [0, 5], [2, EXPERTS], [2, 5], [7, 8]], ids=str)
@pytest.mark.parametrize("experts", [[[0, 2, 7], [7, 5, 2], [8, 4, 1]], [[8, 8, 8], [8, 8, 8]], []], ids=str)
def test_copies_for_other_experts_come_last_and_are_in_no_group(active: list[int], experts: list[list[int]]) -> None:
    """One copy after the other, counted by hand."""
    first, end = active or (0, EXPERTS)
    x = torch.randn(len(experts), WIDTH)
    flat = [expert for row in experts for expert in row]
    order = sorted((n for n, expert in enumerate(flat) if first <= expert < end), key=lambda n: (flat[n], n))
    sizes = [flat.count(expert) for expert in range(first, end)]
    given = torch.tensor(experts, dtype=torch.int32).reshape(-1, TOP)
    copies, index, found, zeros = route(x, given, active_expert_range=active)
    assert (copies.shape, zeros.shape, zeros.dtype) == ((len(flat), WIDTH), (len(flat),), torch.float32)
    assert torch.equal(copies[: len(order)], x[[n // TOP for n in order]])
    assert index.dtype == torch.int32
    assert index.tolist() == [order.index(n) if n in order else -1 for n in range(len(flat))]
    assert (found.dtype, found.tolist()) == (torch.int64, sizes)
    _, reverse, ends, _ = route(x, given, active_expert_range=active, row_idx_type=1, expert_tokens_num_type=0)
    assert (reverse.dtype, reverse[: len(order)].tolist()) == (torch.int32, order)
    assert ends.tolist() == [sum(sizes[: n + 1]) for n in range(len(sizes))]


@pytest.mark.parametrize("skips", [0, 1, 2])
@pytest.mark.parametrize("mode", [None, 0, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_what_the_experts_give_is_weighted_and_added_up(skips: int, mode: int | None, with_bias: bool) -> None:
    rows, top = 4, 3
    expanded, scales, bias = torch.randn(rows * top, WIDTH), torch.rand(rows, top), torch.randn(EXPERTS, WIDTH)
    places = torch.randperm(rows * top)
    experts = torch.randint(0, EXPERTS, (rows, top), dtype=torch.int32)
    added = [torch.randn(rows, WIDTH) for _ in range(skips)]
    out = npu.npu_moe_finalize_routing(
        expanded, *added, *[None] * (2 - skips), bias if with_bias else None, scales, places.int(), experts, mode
    )
    for row in range(rows):
        expected = sum((part[row] for part in added), torch.zeros(WIDTH))
        for copy in range(top):
            place = places[row * top + copy if mode == 2 else copy * rows + row]
            one = expanded[place] + (bias[experts[row, copy]] if with_bias else 0)
            expected = expected + scales[row, copy] * one
        torch.testing.assert_close(out[row], expected)
    one = npu.npu_moe_finalize_routing(expanded, None, None, None, None, places.int(), None, mode)
    assert torch.equal(one, expanded[places])


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


ROWS, PLACES = torch.zeros(6, WIDTH), torch.zeros(6, dtype=torch.int32)
LOGITS, EXPERT = torch.zeros(2, EXPERTS), torch.zeros(2, TOP, dtype=torch.int32)


def _gate(x: Tensor = LOGITS, finished: Tensor | None = None, k: int = 1) -> Any:
    return npu.npu_moe_gating_top_k_softmax(x, finished, k)


def _init(x: Tensor = ROWS[:2], experts: Tensor = EXPERT, **more: Any) -> Any:
    return route(x, experts, **more)


def _sum(**changes: Any) -> Any:
    given = {
        "expanded_permuted_rows": ROWS, "skip1": None, "skip2": None, "bias": None, "scales": torch.ones(2, 3),
        "expanded_src_to_dst_row": PLACES, "export_for_source_row": None, "drop_pad_mode": 2,
    }  # fmt: skip
    return npu.npu_moe_finalize_routing(**(given | changes))


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (_gate, {"x": LOGITS.double()}, "x is .*float64"),
        (_gate, {"x": LOGITS[0]}, r"x is .*; supported: \(rows, experts\) or \(B, S, experts\)"),
        (_gate, {"x": LOGITS[None, None]}, r"x is .*; supported: \(rows, experts\)"),
        (_gate, {"x": LOGITS[:, :0]}, r"x is .*; supported: \(rows, experts\)"),
        (_gate, {"k": 0}, "k is 0; supported: 1 to 8"),
        (_gate, {"k": -1}, "k is -1; supported: 1 to 8"),
        (_gate, {"x": torch.zeros(1, 1100), "k": 1025}, "k is 1025; supported: 1 to 1024"),
        (_gate, {"finished": torch.zeros(2)}, r"finished is .*; supported: a torch.bool tensor of shape \(2,\)"),
        (_gate, {"finished": torch.zeros(3).bool()}, r"finished is .*; supported: a torch.bool tensor of shape \(2,\)"),
        (_gate, {"finished": torch.zeros(1).bool()}, r"finished is .*; supported: a torch.bool tensor of shape \(2,\)"),
        (_init, {"x": ROWS[:2].double()}, "x is .*float64"),
        (_init, {"x": ROWS[0]}, r"x is .*; supported: \(rows, H\)"),
        (_init, {"x": ROWS[None, :2]}, r"x is .*; supported: \(rows, H\)"),
        (_init, {"experts": EXPERT.long()}, "expert_idx is .*int64"),
        (_init, {"experts": EXPERT[:, 0]}, r"expert_idx is .*; supported: a torch.int32 tensor \(2, k\)"),
        (_init, {"experts": EXPERT[..., None]}, r"expert_idx is .*; supported: a torch.int32 tensor \(2, k\)"),
        (_init, {"x": ROWS[:1]}, r"expert_idx is .*; supported: a torch.int32 tensor \(1, k\)"),
        (_init, {"x": ROWS[:3]}, r"expert_idx is .*; supported: a torch.int32 tensor \(3, k\)"),
        (_init, {"experts": EXPERT - 1}, r"expert_idx is \[-1, -1\]; supported: numbers from 0 to 8"),
        *((_init, {"expert_num": n}, f"expert_num is {n}; supported: 1 to 10240") for n in (-1, 0, 10241)),
        *((_init, {"active_num": n}, f"active_num is {n}; supported: -1, 0 or 6") for n in (-2, 1, 5, 7)),
        *((_init, {"active_expert_range": given}, r"active_expert_range is .*; supported: \(first, end\) with 0 <= fir")
          for given in ([-1, 8], [3, 3], [4, 3], [0, 9], [0, 0])),
        (_init, {"expert_tokens_num_type": 2}, "expert_tokens_num_type is 2; supported: 0"),
        (_init, {"row_idx_type": 2}, "row_idx_type is 2; supported: 0"),
        (_sum, {"drop_pad_mode": 1}, "drop_pad_mode is 1; supported: 0"),
        (_sum, {"drop_pad_mode": 3}, "drop_pad_mode is 3; supported: 0"),
        (_sum, {"expanded_permuted_rows": ROWS.double()}, "expanded_permuted_rows is .*float64"),
        *((_sum, {"expanded_permuted_rows": given}, r"expanded_permuted_rows is .*; supported: \(rows · k, H\)")
          for given in (ROWS[None], ROWS[0], ROWS[0, 0])),
        (_sum, {"expanded_src_to_dst_row": PLACES[0]}, r"expanded_src_to_dst_row is .*; supported: a torch.int32 "),
        *((_sum, {"expanded_src_to_dst_row": given}, r"expanded_src_to_dst_row is .*; supported: a torch.int32 ")
          for given in (PLACES.long(), PLACES[None], PLACES[1:], torch.zeros(7, dtype=torch.int32))),
        (_sum, {"scales": None, "k": 2}, "k is 2; supported: 1 where there are no scales"),
        *((_sum, {"scales": torch.ones(shape)}, r"scales is .*; supported: \(rows, k\) with rows · k = 6")
          for shape in (6, (2, 2), (2, 4), (2, 3, 1))),
        (_sum, {"scales": torch.ones(2, 3).bfloat16()}, "scales is .*; supported: torch.float32"),
        (_sum, {"skip2": ROWS[:2]}, "skip2 is .*; supported: None where skip1 is None"),
        *((_sum, {"skip1": given}, r"skip1 is .*; supported: the shape of the result, \(2, 6\)")
          for given in (ROWS[:1], ROWS[:3], ROWS[:2, 1:])),
        (_sum, {"skip1": ROWS[:2], "skip2": ROWS[:3]}, r"skip2 is .*; supported: the shape of the result, \(2, 6\)"),
        (_sum, {"skip1": ROWS[:2].half()}, "skip1 is .*; supported: the dtype of the first input"),
        (_sum, {"bias": ROWS}, "export_for_source_row is None; supported: the expert of each copy"),
        (_sum, {"bias": ROWS[0], "export_for_source_row": EXPERT}, r"bias is .*; supported: \(experts, 6\)"),
        (_sum, {"bias": ROWS[:, 1:], "export_for_source_row": EXPERT}, r"bias is .*; supported: \(experts, 6\)"),
        (_sum, {"bias": ROWS.half(), "export_for_source_row": EXPERT}, "bias is .*; supported: the dtype of the first"),
        (_sum, {"bias": ROWS, "export_for_source_row": EXPERT + 6}, r"export_for_source_row is \[6, 6\]; supported: "),
        (_sum, {"bias": ROWS, "export_for_source_row": EXPERT.long()}, "export_for_source_row is .*int64"),
        (_sum, {"bias": ROWS, "export_for_source_row": EXPERT[:, 1:]}, r"export_for_source_row is .*\(2, 3\)$"),
    ],
)  # fmt: skip
def test_arguments_of_another_form_are_refused(call: Any, changes: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=f"^npu::npu_moe_[a-z0-9_]+: {message}"):
        call(**changes)


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
