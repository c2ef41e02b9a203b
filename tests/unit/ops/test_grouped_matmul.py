"""npu_grouped_matmul: the work follows the rows, groups without rows, lists, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops import grouped_matmul
from qwen2_npu.ops.grouped_matmul import empty_weight, npu_grouped_matmul, products
from tests.unit.ops.support import Recorder, compiled

npu = torch.ops.npu


def grouped(x: Tensor, weight: Tensor, sizes: Tensor | list[int], **more: Any) -> Tensor:
    sizes = torch.tensor(sizes) if isinstance(sizes, list) else sizes
    given = {"group_list": sizes, "split_item": 2, "group_type": 0, "group_list_type": 1, **more}
    (y,) = npu.npu_grouped_matmul([x], [weight], **given)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_group_has_its_weight(dtype: torch.dtype, transposed: bool) -> None:
    x, weight = torch.randn(9, 8).to(dtype), torch.randn(4, 8, 6).to(dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    expected = torch.cat([x[:3] @ weight[0], x[3:4] @ weight[2], x[4:] @ weight[3]])
    torch.testing.assert_close(grouped(x, weight, [3, 0, 1, 5]), expected)


def test_weights_of_groups_without_rows_are_not_read() -> None:
    """One row per group, on two of 64: two products, each of one row, and nothing that reads all weights."""
    x, weight = torch.randn(2, 32), torch.full((64, 32, 16), torch.nan)
    weight[[7, 50]] = torch.randn(2, 32, 16)
    sizes = [int(expert in (7, 50)) for expert in range(64)]
    with Recorder() as recorder:
        y = products(x, [weight], [], torch.tensor(sizes), 1)
    found = [call for call in recorder.calls if call.name in ("mm", "addmm", "bmm", "matmul", "linear")]
    assert len(found) == 2
    assert recorder.largest_read == 32 * 16
    torch.testing.assert_close(y, torch.cat([x[:1] @ weight[7], x[1:] @ weight[50]]))
    assert torch.equal(y, grouped(x, weight, sizes))


def test_the_recorder_sees_a_dense_product() -> None:
    with Recorder() as recorder:
        torch.einsum("rk,ekn->ern", torch.randn(2, 32), torch.randn(64, 32, 16))
    assert recorder.largest_read == 64 * 32 * 16


@pytest.mark.parametrize("sizes", [[7, 0, 0], [0, 0, 7], [0, 7, 0]])
def test_all_rows_in_one_group(sizes: list[int]) -> None:
    x, weight = torch.randn(7, 8), torch.randn(3, 8, 6)
    torch.testing.assert_close(grouped(x, weight, sizes), x @ weight[sizes.index(7)])


def test_no_rows() -> None:
    assert grouped(torch.randn(0, 8), torch.randn(3, 8, 6), [0, 0, 0]).shape == (0, 6)


def test_ends_and_sizes() -> None:
    x, weight = torch.randn(7, 8), torch.randn(3, 8, 6)
    expected = grouped(x, weight, [2, 0, 5])
    for kind in (0, None):
        assert torch.equal(grouped(x, weight, [2, 2, 7], group_list_type=kind), expected)


def test_one_result_per_group() -> None:
    x, weight = torch.randn(7, 8), torch.randn(3, 8, 6)
    made = npu.npu_grouped_matmul(
        [x], [weight], group_list=torch.tensor([2, 0, 5]), split_item=0, group_type=0, group_list_type=1
    )
    assert [tuple(y.shape) for y in made] == [(2, 6), (0, 6), (5, 6)]
    torch.testing.assert_close(torch.cat(list(made)), grouped(x, weight, [2, 0, 5]))


def test_lists_of_tensors() -> None:
    x, weight = [torch.randn(2, 3, 8), torch.randn(4, 5)], [torch.randn(8, 6), torch.randn(5, 3)]
    for y, part, matrix in zip(npu.npu_grouped_matmul(x, weight, group_type=-1), x, weight, strict=True):
        torch.testing.assert_close(y, part @ matrix)


def test_one_weight_of_all_groups_and_an_x_for_each() -> None:
    x, weight = [torch.randn(2, 3, 8), torch.randn(4, 8)], torch.randn(2, 8, 6)
    made = npu.npu_grouped_matmul(x, [weight], group_type=-1)
    for y, part, matrix in zip(made, x, weight, strict=True):
        torch.testing.assert_close(y, part @ matrix)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("sizes", [[2, 0, 5], [0, 6, 1], None])
def test_every_group_has_its_bias(stacked: bool, sizes: list[int] | None) -> None:
    x, weight, bias = torch.randn(7, 8), torch.randn(3, 8, 6), torch.randn(3, 6)
    given = {"bias": [bias] if stacked else list(bias)}
    weights, parts = [weight] if stacked else list(weight), x.split(sizes or [2, 1, 4])
    if sizes is None:
        made = npu.npu_grouped_matmul(list(parts), weights, group_type=-1, **given)
    else:
        groups = {"group_list": torch.tensor(sizes), "group_list_type": 1, "group_type": 0}
        made = npu.npu_grouped_matmul([x], weights, **groups, **given)
    for y, part, matrix, added in zip(made, parts, weight, bias, strict=True):
        torch.testing.assert_close(y, part @ matrix + added)


@pytest.mark.parametrize(("split_item", "count"), [(None, 2), (0, 2), (1, 2), (2, 1), (3, 1)])
@pytest.mark.parametrize(("divided", "group_type"), [(False, -1), (False, 0), (True, 0)])
def test_results_are_one_for_each_group_or_one_for_all(
    split_item: int | None, count: int, divided: bool, group_type: int
) -> None:
    x, weight = torch.randn(7, 8), torch.randn(2, 8, 6)
    if divided:
        groups = {"group_list": torch.tensor([3, 7]), "group_type": 0}
        made = npu.npu_grouped_matmul([x], [weight], split_item=split_item, **groups)
    else:
        made = npu.npu_grouped_matmul([x[:3], x[3:]], [weight], split_item=split_item, group_type=group_type)
    assert len(made) == count
    torch.testing.assert_close(torch.cat(list(made)), torch.cat((x[:3] @ weight[0], x[3:] @ weight[1])))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_products_that_a_gradient_is_wanted_of() -> None:
    """Below autograd they are ordinary products, unless they are written to their places."""
    x, weight = torch.randn(7, 8, requires_grad=True), torch.randn(3, 8, 6)
    grouped(x, weight, [2, 0, 5]).sum().backward()
    expected = torch.cat((weight[0].sum(1).expand(2, -1), weight[2].sum(1).expand(5, -1)))
    torch.testing.assert_close(x.grad, expected)


def test_a_group_list_of_integers() -> None:
    """The operator's other overload, which is an NPU's alone."""
    x, weight = torch.randn(7, 8), torch.randn(3, 8, 6)
    for group_type in (None, 0):
        made = npu_grouped_matmul([x], list(weight), group_list=[2, 2, 7], split_item=3, group_type=group_type)
        assert torch.equal(made[0], grouped(x, weight, [2, 0, 5]))
    with pytest.raises(ValueError, match="group_type is -1; supported: 0"):
        npu_grouped_matmul([x], list(weight), group_list=[2, 2, 7], split_item=3, group_type=-1)


@pytest.mark.parametrize("wrong", range(3))
def test_one_bias_of_another_dtype_is_refused(wrong: int) -> None:
    bias = list(torch.zeros(3, 6))
    bias[wrong] = bias[wrong].to(HALF)
    with pytest.raises(ValueError, match=r"bias is .*; supported: torch.float32 tensors"):
        npu.npu_grouped_matmul(
            [torch.randn(7, 8)], list(torch.randn(3, 8, 6)), bias=bias, group_list=torch.tensor([2, 0, 5]),
            group_list_type=1, group_type=0,
        )  # fmt: skip


def test_the_bias_is_summed_before_rounding() -> None:
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    bias = torch.full((1, 1), 1.25 * 2.0**-8)
    assert grouped(x, weight, [1], bias=[bias]).item() == 1 + 2.0**-7
    assert grouped(x, weight, [1], bias=[bias * 0.5]).item() == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_holds_any_group_list(backend: str) -> None:
    run, counter = compiled(lambda *given: grouped(*given) + 1, backend)
    x, weight = torch.randn(7, 8), torch.randn(3, 8, 6)
    with torch.no_grad():
        for sizes in ([2, 0, 5], [7, 0, 0]):
            torch.testing.assert_close(run(x, weight, torch.tensor(sizes)), grouped(x, weight, sizes) + 1)
        with pytest.raises(ValueError, match="group_list is"):
            run(x, weight, torch.tensor([1, 0, 5]))
    assert counter.frame_count == 1


def test_fake_tensors_need_no_group_list() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(5, 8, dtype=torch.bfloat16), torch.empty(3, 8, 6, dtype=torch.bfloat16)
        y = grouped(x, weight, torch.empty(3, dtype=torch.int64))
    assert (y.shape, y.dtype) == ((5, 6), torch.bfloat16)


@pytest.mark.parametrize(
    ("sizes", "kind"), [([2, 1, 5], 1), ([2, 1, 3], 1), ([-1, 3, 5], 1), ([2, 1, 7], 0), ([2, 2, 6], 0), ([2, 0, 5], 0)]
)
def test_groups_that_are_not_the_rows(sizes: list[int], kind: int) -> None:
    """Among them sizes taken for ends, the mistake that is easily made."""
    form = ("ends", "sizes")[kind]
    with pytest.raises(ValueError, match=rf"group_list is \[.*\]; supported: {form} .* together the 7 rows of x"):
        grouped(torch.zeros(7, 8), torch.zeros(3, 8, 6), sizes, group_list_type=kind)


X, WEIGHT, HALF = torch.zeros(7, 8), torch.zeros(3, 8, 6), torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"split_item": n}, f"split_item is {n}; supported: 0 or 1") for n in (-1, 4)),
        *(({"group_list_type": n}, f"group_list_type is {n}; supported: 0") for n in (-1, 2)),
        *(({"group_type": n}, f"group_type is {n}; supported: 0") for n in (-1, 1, 2, None)),
        ({"x": []}, "x is .*; supported: a list of 1 to 128 tensors"),
        ({"x": [X] * 129}, "x is .*; supported: a list of 1 to 128 tensors"),
        ({"weight": []}, "weight is .*; supported: a list of 1 to 128 tensors"),
        ({"x": [X.double()]}, "x is .*float64"),
        ({"x": [X.to(HALF)]}, "weight is .*; supported: the dtype of the first input"),
        ({"x": [X, X.to(HALF)]}, "x is .*; supported: the dtype of the first input"),
        ({"weight": [WEIGHT[0], WEIGHT[1], WEIGHT[2].to(HALF)]}, "weight is .*; supported: the dtype of the first"),
        ({"x": [X[0]]}, "x is .*; supported: two or more dimensions, the last below 65536"),
        ({"weight": [WEIGHT[0, 0]] * 3}, "weight is .*; supported: two or more dimensions, the last below 65536"),
        ({"x": [torch.zeros(1, 65536)]}, "x is .*; supported: two or more dimensions, the last below 65536"),
        ({"weight": [WEIGHT[:0]]}, "weight is .*; supported: weights of 1 to 1024 groups"),
        ({"weight": [torch.zeros(1025, 8, 1)]}, "weight is .*; supported: weights of 1 to 1024 groups"),
        ({"weight": [WEIGHT, WEIGHT]}, r"weight is .*; supported: one \(groups, K, N\), or one \(K, N\) per group"),
        ({"weight": [WEIGHT[0], WEIGHT[0], WEIGHT]}, r"weight is .*; supported: one \(groups, K, N\), or one \(K, N\)"),
        ({"weight": [WEIGHT, WEIGHT[0], WEIGHT[0]]}, r"weight is .*; supported: one \(groups, K, N\), or one \(K, N\)"),
        ({"weight": [WEIGHT[None]]}, r"weight is .*; supported: one \(groups, K, N\), or one \(K, N\) per group"),
        ({"weight": [*WEIGHT[:2], torch.zeros(7, 6)]}, r"x is .*; supported: \(..., K\) with K = \[8, 8, 7\]"),
        *(({"weight": [*WEIGHT[:2], torch.zeros(8, n)]}, "weight is .*; supported: weights with the same N")
          for n in (5, 7)),
        ({"weight": [*WEIGHT[:2], torch.zeros(8, 7)], "split_item": 0}, "weight is .*; supported: weights with"),
        *(({"bias": [torch.zeros(shape)]}, r"bias is .*; supported: torch.float32 tensors of shapes \[\(3, 6\)\]")
          for shape in ((3, 5), (2, 6), (4, 6), 6)),
        ({"bias": list(torch.zeros(3, 6))}, r"bias is .*; supported: torch.float32 tensors of shapes \[\(3, 6\)\]"),
        ({"bias": [torch.zeros(3, 6).to(HALF)]}, "bias is .*; supported: torch.float32 tensors"),
        ({"group_list": torch.tensor([2, 0, 5]).int()}, "group_list is .*; supported: an int64 tensor"),
        *(({"group_list": torch.tensor(sizes)}, r"group_list is .*; supported: an int64 tensor of shape \(3,\)")
          for sizes in ([2, 5], [2, 0, 5, 0])),
        ({"group_list": torch.tensor([[2, 0, 5]])}, "group_list is .*; supported: an int64 tensor"),
        ({"x": [X[None]], "split_item": 0}, r"x is .*; supported: \(M, K\) where a group_list divides the rows"),
        ({"x": [X, X, X]}, "group_list is .*; supported: None where every group has an x of its own"),
        ({"group_list": None}, "group_list is None; supported: one tensor for each of the 3 weights, or one "),
        ({"group_list": None, "x": [X, X]}, "x is .*; supported: one tensor for each of the 3 weights, or one"),
        ({"group_list": None, "x": [X] * 4}, "x is .*; supported: one tensor for each of the 3 weights, or one"),
        ({"group_list": None, "weight": [WEIGHT[:1]]}, "group_list is None; supported: one tensor for each of the 1 w"),
        *(({"group_list": None, "x": x, "split_item": n}, r"x is .*; supported: \(M, K\) where the result is one")
          for n, x in ((2, [X[None]] * 3), (3, [X, X, X[None]]))),
        ({"group_list": None, "x": [X] * 3, "split_item": 2, "weight": [*WEIGHT[:2], torch.zeros(8, 5)]},
         "weight is .*; supported: weights with the same N"),
    ],
)  # fmt: skip
def test_arguments_of_another_form_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"x": [X], "weight": [WEIGHT], "group_list": torch.tensor([2, 0, 5]), "group_type": 0}
    given |= {"group_list_type": 1, "split_item": 2}
    npu.npu_grouped_matmul(**given)
    with pytest.raises(ValueError, match=f"^npu::npu_grouped_matmul: {message}"):
        npu.npu_grouped_matmul(**(given | changes))


def test_limits_of_the_lists_themselves_are_taken() -> None:
    wide, deep = torch.zeros(1, 65535), torch.zeros(1024, 1, 1)
    assert len(npu.npu_grouped_matmul([X[:1]] * 128, [WEIGHT[0]] * 128, group_type=-1)) == 128
    assert npu.npu_grouped_matmul([wide], [wide.mT[None]], group_type=-1)[0].shape == (1, 1)
    assert grouped(torch.zeros(0, 1), deep, [0] * 1024).shape == (0, 1)


def test_errors() -> None:
    x, weight = torch.zeros(7, 8), torch.zeros(3, 8, 6)
    with pytest.raises(ValueError, match=r"group_list is .*\(2,\); supported: an int64 tensor of shape \(3,\)"):
        grouped(x, weight, [2, 5])
    with pytest.raises(ValueError, match=r"x is \[a torch.float32 .*\(7, 7\)\]; supported: .* K = \[8\]"):
        grouped(x[:, 1:], weight, [2, 0, 5])
    with pytest.raises(ValueError, match="group_type is None; supported: 0"):
        grouped(x, weight, [2, 0, 5], group_type=None)
    with pytest.raises(ValueError, match=r"bias is \[.*bfloat16.*\]; supported: torch.float32 tensors"):
        grouped(x.bfloat16(), weight.bfloat16(), [2, 0, 5], bias=[torch.zeros(3, 6, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="act_type is 5; supported: only the default 0"):
        grouped(x, weight, [2, 0, 5], act_type=5)
    with pytest.raises(ValueError, match="group_list is None; supported: one tensor for each of the 3 weights"):
        npu.npu_grouped_matmul([x], [weight], group_type=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_of_weights_is_the_layout_that_the_device_multiplies_fastest(dtype: torch.dtype) -> None:
    """A layout, not another shape, and no other result than a contiguous weight gives."""
    weight = empty_weight((3, 64, 48), dtype, torch.device("cpu"))
    assert (weight.shape, weight.dtype) == ((3, 64, 48), dtype)
    assert (weight.mT if dtype == torch.bfloat16 else weight).is_contiguous()
    weight.copy_(torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0)))
    assert empty_weight((3, 64, 48), dtype, torch.device("meta")).is_contiguous()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = (grouped(x, memory, [1, 0, 5]) for memory in (weight, weight.contiguous()))
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_gradients_products_go_straight_to_their_places(dtype: torch.dtype) -> None:
    """The same bits with and without."""
    x, weight = torch.randn(9, 16).to(dtype), torch.randn(4, 16, 8).to(dtype)
    expected = grouped(x, weight, [3, 0, 1, 5])
    with torch.no_grad():
        assert torch.equal(grouped(x, weight, [3, 0, 1, 5]), expected)


@pytest.mark.parametrize("stacked", [True, False])
def test_without_gradients_every_group_has_its_bias_too(stacked: bool) -> None:
    x, weight, bias = torch.randn(7, 8), torch.randn(3, 8, 6), torch.randn(3, 6)
    with torch.no_grad():
        found = npu_grouped_matmul(
            [x], [weight] if stacked else list(weight), bias=[bias] if stacked else list(bias), group_list=[2, 2, 7],
            split_item=2,
        )[0]  # fmt: skip
    torch.testing.assert_close(found, torch.cat((x[:2] @ weight[0] + bias[0], x[2:] @ weight[2] + bias[2])))


@pytest.mark.parametrize("gradients", [True, False])
def test_transposed_weights_alone_are_multiplied_as_those_of_linear_layers(
    gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight is (N, K), contiguous; for one row of bfloat16 it reads that faster."""
    taken: list[Tensor] = []
    right = grouped_matmul.linear
    monkeypatch.setattr(grouped_matmul, "linear", lambda x, weight: taken.append(weight) or right(x, weight))
    x, weight = torch.randn(6, 8), torch.randn(3, 8, 6)
    with torch.set_grad_enabled(gradients):
        for memory, groups in ((weight, 0), (weight.mT.contiguous().mT, 2)):
            found = grouped(x, memory, [1, 0, 5])
            torch.testing.assert_close(found, torch.cat((x[:1] @ weight[0], x[1:] @ weight[2])))
            assert [tuple(own.shape) for own in taken] == [(6, 8)] * groups
            assert all(own.is_contiguous() for own in taken)
