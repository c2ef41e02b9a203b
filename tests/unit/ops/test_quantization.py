"""Operators of 8-bit weights: the product that reads int8, and the sizes that it is not given."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.ops import quantization
from qwen2_npu.ops.quantization import _takes_packed

npu = torch.ops.npu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 96, 64), (3, 896, 32), (16, 64, 160), (17, 64, 32), (2, 1, 5), (3, 72, 64), (3, 64, 72), (3, 64, 0)],
)
def test_a_transposed_weight(rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, inner).to(dtype), torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    scale = (torch.rand(columns) / 127).to(dtype)
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale)
    exact = (x.double() @ weight.double().T) * scale.double()
    size = (x.double().abs() @ weight.double().abs().T) * scale.double()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * size).all()
    blocks = columns > 0 and (inner % 32, columns % 32) == (0, 0)
    assert _takes_packed(x, weight.mT) == (blocks and rows <= 16 and dtype == torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_in_float32_err_no_more_than_an_ordinary_product(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 896), torch.randint(-127, 128, (512, 896), dtype=torch.int8)
    scale, added = torch.rand(512) / 127, torch.randn(512) if bias else None
    exact = torch.nn.functional.linear(
        x.double(), weight * scale.double()[:, None], None if added is None else added.double()
    )
    plain = torch.nn.functional.linear(x, weight * scale[:, None], added)
    ours = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale, bias=added)
    ours_error, plain_error = ((y.double() - exact).square().mean().sqrt() for y in (ours, plain))
    assert ours_error <= 1.5 * plain_error


def test_fake_tensors_tell_the_shape() -> None:
    with FakeTensorMode():
        sums = torch.ops.qwen2_npu.integer_product(
            *(torch.empty(size, dtype=torch.int8) for size in ((2, 3, 4), (4, 5)))
        )
        assert (sums.shape, sums.dtype) == ((2, 3, 5), torch.int32)
        x, weight = torch.empty(4, 3584).bfloat16(), torch.empty(4608, 3584, dtype=torch.int8)
        assert npu.npu_weight_quant_batchmatmul(x, weight.mT, torch.empty(4608).bfloat16()).shape == (4, 4608)


def test_the_head_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"npu_weight_quant_batchmatmul: weight .*152064.* at most 65535: keep such a head"
    ):
        npu.npu_weight_quant_batchmatmul(
            torch.zeros(1, 8), torch.zeros(8, 152064, dtype=torch.int8), torch.zeros(152064)
        )


def _weight_only(**changes: Any) -> Any:
    given = {"x": torch.ones(3, 8), "weight": INT8_WEIGHT, "antiquant_scale": torch.ones(4)}
    return npu.npu_weight_quant_batchmatmul(**(given | changes))


def _integers(**changes: Any) -> Any:
    given = {"x1": torch.ones(3, 8, dtype=torch.int8), "x2": INT8_WEIGHT, "scale": torch.ones(4), "output_dtype": 15}
    return npu.npu_quant_matmul(**(given | changes))


INT8_WEIGHT = torch.ones(8, 4, dtype=torch.int8)
PER_ROW, PER_COLUMN = torch.ones(3), torch.ones(4)


@pytest.mark.parametrize(
    ("product", "changes", "message"),
    [
        (_weight_only, {"x": torch.ones(1, 3, 8)}, r"x is .*\(1, 3, 8\); supported: \(M, K\)$"),
        (_weight_only, {"x": torch.ones(8)}, r"x is .*\(8,\); supported: \(M, K\)$"),
        (_weight_only, {"x": torch.ones(3, 7)}, r"x is .*\(3, 7\); supported: a last dimension of 8, the K of weight"),
        (_weight_only, {"x": torch.ones(3, 9)}, r"x is .*\(3, 9\); supported: a last dimension of 8, the K of weight"),
        (_weight_only, {"weight": INT8_WEIGHT[:, 0]}, r"weight is .*; supported: int8 of shape \(K, N\)"),
        (_weight_only, {"weight": INT8_WEIGHT[..., None]}, r"weight is .*; supported: int8 of shape \(K, N\)"),
        (_weight_only, {"weight": INT8_WEIGHT.int()}, r"weight is .*int32.*; supported: int8 of shape \(K, N\)"),
        (_weight_only, {"antiquant_scale": torch.ones(5)}, r"antiquant_scale is .*of shape \(4,\) or \(1, 4\)$"),
        (_weight_only, {"antiquant_scale": torch.ones(4, 1)}, r"antiquant_scale is .*of shape \(4,\) or \(1, 4\)$"),
        (_weight_only, {"bias": torch.ones(5)}, r"bias is .*torch.float32 of shape \(4,\) or \(1, 4\)$"),
        (_weight_only, {"bias": torch.ones(4).half()}, r"bias is .*float16.*; supported: torch.float32 of"),
        (_weight_only, {"inner_precise": 2}, r"inner_precise is 2; supported: 0 or 1$"),
        (_weight_only, {"antiquant_group_size": 32}, r"antiquant_group_size"),
        (_integers, {"x1": torch.ones(8, dtype=torch.int8)}, r"x1 is .*; supported: .*two or more dimensions$"),
        (_integers, {"x1": torch.ones(3, 8)}, r"x1 is .*float32.*; supported: int8 of shape"),
        (_integers, {"x1": torch.ones(3, 9, dtype=torch.int8)}, r"x1 is .*\(3, 9\); supported: a last dimension of 8"),
        (_integers, {"x2": INT8_WEIGHT[..., None]}, r"x2 is .*; supported: int8 of shape \(K, N\)"),
        (_integers, {"x2": INT8_WEIGHT.new_ones(8, 65536)}, r"x2 is .*; supported: K and N of at most 65535"),
        (_integers, {"scale": torch.ones(1, 4)}, r"scale is .*of shape \(4,\) or \(1,\)$"),
        (_integers, {"scale": torch.ones(4).half()}, r"scale is .*; supported: float32 or bfloat16"),
        (_integers, {"scale": torch.ones(4).bfloat16(), "output_dtype": 5}, r"scale is .*; supported: float32 where"),
        (_integers, {"pertoken_scale": PER_COLUMN}, r"pertoken_scale is .*; supported: float32 of shape \(3,\)"),
        (_integers, {"pertoken_scale": PER_ROW.bfloat16()}, r"pertoken_scale is .*; supported: float32 of"),
        (_integers, {"pertoken_scale": PER_ROW, "output_dtype": 3}, r"pertoken_scale is "),
        (_integers, {"bias": torch.ones(1, 4)}, r"bias is .*; supported: shape \(4,\)$"),
        (_integers, {"bias": torch.ones(4).bfloat16(), "output_dtype": 5}, r"bias is .*; supported: torch.int32 or"),
        (_integers, {"bias": torch.ones(4), "output_dtype": 3}, r"bias is .*; supported: torch.int32 of shape"),
        (_integers, {"output_dtype": 6}, r"output_dtype is 6; supported: "),
        (_integers, {"output_dtype": None}, r"output_dtype is None; supported: "),
    ],
)  # fmt: skip
def test_products_of_another_shape_or_dtype_are_refused(product: Any, changes: dict[str, Any], message: str) -> None:
    product()
    with pytest.raises(ValueError, match=f"^npu::npu_[a-z_]+: {message}"):
        product(**changes)


@pytest.mark.parametrize("rows", [(3,), (2, 3), (1, 2, 3)])
def test_scales_per_row_are_of_the_last_dimension_but_one(rows: tuple[int, ...]) -> None:
    """Whatever dimensions stand before it."""
    tokens = torch.rand(rows[-1])
    x1 = torch.randint(-127, 128, (*rows, 8), dtype=torch.int8)
    y = npu.npu_quant_matmul(x1, INT8_WEIGHT, torch.ones(4), pertoken_scale=tokens, output_dtype=15)
    expected = x1.int().sum(-1, keepdim=True).expand(*rows, 4) * tokens[:, None].double()
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)


def test_a_bias_is_added_before_rounding() -> None:
    x, weight = torch.randn(1, 896).bfloat16(), torch.randint(-127, 128, (64, 896), dtype=torch.int8)
    scale, bias = (torch.rand(64) / 127).bfloat16(), torch.randn(64) * 50
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, scale, bias=bias)
    exact = (x.double() @ weight.double().T) * scale.double() + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(("supported", "exact"), [(False, False), (True, True)])
def test_the_processor_is_asked_once(supported: bool, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: asked.append(1) or supported)
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: (x.double() @ y.double()).int())
    quantization._int8_product_is_exact.cache_clear()
    try:
        assert [quantization._int8_product_is_exact() for _ in range(2)] == [exact, exact]
    finally:
        quantization._int8_product_is_exact.cache_clear()
    assert asked == [1]


@pytest.mark.parametrize("limit", ["", "AVX2"])
def test_integers_are_exact_where_onednn_is_kept_from_vnni(limit: str) -> None:
    """PyTorch's product of them is not, there."""
    code = (
        "import torch; from qwen2_npu.ops import quantization as q\n"
        "x, y = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((5, 1536), (1536, 64)))\n"
        "print(torch.equal(q.integer_product(x, y), (x.double() @ y.double()).int()))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("inner", [0, 1, 1024, 1025, 3000])
@pytest.mark.parametrize("columns", [0, 1, 600])
@pytest.mark.parametrize("rows", [(2, 3), (0,)])
@pytest.mark.parametrize("by_parts", [True, False])
def test_integers_are_exact(
    inner: int, columns: int, rows: tuple[int, ...], by_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_parts:
        monkeypatch.setattr(quantization, "_int8_product_is_exact", lambda: False)
        monkeypatch.setattr(quantization, "BLOCK_BYTES", 1 << 20)
    x = torch.full((*rows, inner), -128, dtype=torch.int8)
    weight = torch.full((inner, columns), -128, dtype=torch.int8)
    x[..., ::7], weight[::2] = 127, -127  # an odd sum of 3000: float32 would round it, above 2^24
    sums = quantization.integer_product(x, weight)
    assert (sums.dtype, sums.shape) == (torch.int32, (*rows, columns))
    assert torch.equal(sums.double(), x.double() @ weight.double())


@pytest.mark.parametrize("size", [1.0, 2.0**90, 2.0**-100, 2.0**-126])
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("block", [1, 4 * 96 * 7, quantization.BLOCK_BYTES])
def test_a_product_by_blocks_is_as_exact_as_a_whole_one(
    rows: int, size: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes within a row: a few activations of real models are hundreds of times the others."""
    monkeypatch.setattr(quantization, "BLOCK_BYTES", block)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 96), torch.randint(-127, 128, (64, 96), dtype=torch.int8)
    x[:, 3] *= 300
    x = x * size
    for given in (weight.mT, weight.mT.contiguous()):
        y = quantization.product_by_blocks(x, given)
        exact = x.double() @ weight.double().T
        bound = x.double().abs() @ weight.double().abs().T
        assert ((y.double() - exact).abs() <= 16 * torch.finfo(torch.float32).eps * bound + 2.0**-140).all()


def test_of_a_weight_no_more_than_a_block_is_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y, **given: made.append(y.nbytes) or product(x, y, **given))
    quantization.product_by_blocks(torch.ones(2, 1024), torch.ones(1024, 1280, dtype=torch.int8))
    assert made == [quantization.BLOCK_BYTES] * 2 + [1 << 20]
    made.clear()
    monkeypatch.setattr(quantization, "BLOCK_BYTES", 1)  # a column at a time where one is larger than a block
    quantization.product_by_blocks(torch.ones(2, 1024), torch.ones(1024, 3, dtype=torch.int8))
    assert made == [4096] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_have_gradients(dtype: torch.dtype) -> None:
    """A call outside of torch.no_grad has activations that ask for them."""
    x, weight = torch.randn(20, 896).to(dtype).requires_grad_(), torch.randint(-127, 128, (640, 896), dtype=torch.int8)
    scale = torch.rand(640).to(dtype)
    npu.npu_weight_quant_batchmatmul(x, weight.mT, scale).float().sum().backward()
    assert x.grad is not None
    expected = (weight.double() * scale.double()[:, None]).sum(0).expand(20, -1)
    # Added up in float32, 640 numbers of at most 127, and rounded once.
    atol = 640 * 127 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(x.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=atol)


def test_a_row_whose_scale_has_few_bits_keeps_to_int8() -> None:
    """190 times the smallest number there is: its scale is rounded to one of them."""
    x = torch.tensor([[190.0, -190.0, 1.0]]) * 2.0**-149
    y, scale = npu.npu_dynamic_quant(x)
    assert (y.tolist(), scale.item()) == ([[127, -128, 1]], 2.0**-149)


def test_a_row_of_zeros_and_one_that_is_not_finite() -> None:
    x, weight = torch.ones(4, 64), torch.ones(32, 64, dtype=torch.int8)
    x[0] = 0
    x[1, 5], x[2, 5] = torch.inf, torch.nan
    y = npu.npu_weight_quant_batchmatmul(x, weight.mT, torch.ones(32))
    assert torch.equal(y[0], torch.zeros(32))
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3], torch.full((32,), 64.0))


@pytest.mark.parametrize("bias", [torch.int32, torch.float32, torch.bfloat16])
def test_a_bias_of_every_dtype_of_a_result_in_bfloat16(bias: torch.dtype) -> None:
    x1, added = torch.ones(3, 8, dtype=torch.int8), torch.arange(4).to(bias)
    y = npu.npu_quant_matmul(x1, INT8_WEIGHT, torch.full((4,), 0.5), bias=added, output_dtype=15)
    expected = 4 + added.double() * (0.5 if bias == torch.int32 else 1.0)
    assert torch.equal(y.double(), expected.expand(3, 4))


def test_int32_is_not_scaled() -> None:
    x, weight = (
        torch.randint(-127, 128, (3, 64), dtype=torch.int8),
        torch.randint(-127, 128, (40, 64), dtype=torch.int8),
    )
    bias = torch.randint(-9, 9, (40,), dtype=torch.int32)
    exact = x.int() @ weight.int().T
    for scale in (torch.full((40,), 5.0), torch.ones(1, dtype=torch.bfloat16)):
        y = npu.npu_quant_matmul(x, weight.mT, scale, bias=bias, output_dtype=torch.int32)
        assert y.dtype == torch.int32
        assert torch.equal(y, exact + bias)


@pytest.mark.parametrize("strides", [(64, 1), (1, 1), (7, 1)])
def test_one_row_of_any_stride(strides: tuple[int, int]) -> None:
    memory = torch.randint(-127, 128, (64,), dtype=torch.int8)
    weight = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    y = npu.npu_quant_matmul(memory.as_strided((1, 64), strides), weight.mT, torch.ones(32), output_dtype=torch.int32)
    assert torch.equal(y[0], weight.int() @ memory.int())


def test_one_position_of_several_in_a_compiled_graph() -> None:
    """What last_layer does with rows that the norm has quantised."""
    values, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((1, 8, 64), (32, 64)))
    index = torch.tensor([[7]])

    def function(values: torch.Tensor) -> torch.Tensor:
        one = values.gather(1, index[:, :, None].expand(1, 1, 64))
        return npu.npu_quant_matmul(one.reshape(-1, 64), weight.mT, torch.ones(32), output_dtype=3)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(function)(values), function(values))


# ---- activations ----------------------------------------------------------------------------------------------------
def by_hand(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows and their scales, of float64."""
    scale = wide.double().abs().amax(-1) / 127
    rows = wide.double() / scale.clamp(min=1e-300).unsqueeze(-1)
    return rows.round().to(torch.int8), scale


def assert_quantised(found: tuple[torch.Tensor, torch.Tensor], wide: torch.Tensor) -> None:
    """As by hand; in float32 a value near the middle of two integers may become the other one."""
    values, scale = by_hand(wide)
    assert (found[0].dtype, found[0].shape, found[1].dtype) == (torch.int8, wide.shape, torch.float32)
    torch.testing.assert_close(found[1].double(), scale, rtol=1e-5, atol=0)
    difference = (found[0].int() - values.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_scaled_by_their_largest(shape: tuple[int, ...], dtype: torch.dtype, smooth: bool) -> None:
    x, factors = torch.randn(shape).to(dtype), (torch.rand(64) + 0.5).to(dtype)
    x[..., 0, :] = 0
    found = npu.npu_dynamic_quant(x, smooth_scales=factors if smooth else None)
    assert_quantised(found, x.float() * factors.float() if smooth else x)
    assert not found[0][..., 0, :].any()
    assert not found[1][..., 0].any()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y, factors: npu.npu_dynamic_quant(x, smooth_scales=factors),
        lambda x, y, factors: npu.npu_add_rms_norm_dynamic_quant(x, y, factors),
        lambda x, y, factors: npu.npu_weight_quant_batchmatmul(
            x, torch.ones(64, 64, dtype=torch.int8), factors, bias=factors
        ),
    ],
    ids=["dynamic_quant", "add_rms_norm", "product"],
)
def test_float32_inputs_are_left_as_they_are(call: Any) -> None:
    """No copy is made of them, as is of 16 bits, which alone the catalogue has."""
    inputs = torch.randn(5, 64), torch.randn(5, 64), torch.rand(64) + 0.5
    before = [tensor.clone() for tensor in inputs]
    call(*inputs)
    assert all(map(torch.equal, inputs, before))


def test_rows_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 2.6, -0.4]])
    values, scale = npu.npu_dynamic_quant(x)
    assert (values.tolist(), scale.tolist()) == ([[127, -127, 0, 2, -2, 3, 0]], [1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_a_sum_is_normalised_and_quantised(dtype: torch.dtype, epsilon: float) -> None:
    x1, x2, gamma = torch.randn(3, 4, 64).to(dtype), torch.randn(3, 4, 64).to(dtype), torch.randn(64).to(dtype)
    for mask in (None, [True, False]):
        y, other, x, scale, no_scale = npu.npu_add_rms_norm_dynamic_quant(
            x1, x2, gamma, epsilon=epsilon, output_mask=mask
        )
        assert torch.equal(x, x1 + x2)
        wide = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + epsilon) * gamma.double()
        assert_quantised((y, scale), wide)
        assert other.numel() == no_scale.numel() == 0


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("of_rows", [None, (5,), (5, 1)])
@pytest.mark.parametrize("of_columns", [(64,), (1, 64)])
def test_sums_are_scaled_gated_and_quantised(left: bool, of_rows: Any, of_columns: tuple[int, ...]) -> None:
    x = torch.randint(-3000, 3000, (5, 64), dtype=torch.int32)
    columns, rows = torch.rand(of_columns) / 1000, None if of_rows is None else torch.rand(of_rows) + 0.5
    found = npu.npu_dequant_swiglu_quant(
        x, weight_scale=columns, activation_scale=rows, activate_left=left, quant_mode=1
    )
    wide = x.double() * columns.double().reshape(1, 64) * (1 if rows is None else rows.double().reshape(5, 1))
    first, second = wide.chunk(2, -1)
    gate, up = (first, second) if left else (second, first)
    assert_quantised(found, gate / (1 + torch.exp(-gate)) * up)


def _rows(**changes: Any) -> Any:
    return npu.npu_dynamic_quant(**({"input": torch.ones(3, 8)} | changes))


def _normed(**changes: Any) -> Any:
    given = {"x1": torch.ones(3, 8), "x2": torch.ones(3, 8), "gamma": torch.ones(8)}
    return npu.npu_add_rms_norm_dynamic_quant(**(given | changes))


def _gated(**changes: Any) -> Any:
    given = {"x": torch.ones(3, 8, dtype=torch.int32), "weight_scale": torch.ones(8), "quant_mode": 1}
    return npu.npu_dequant_swiglu_quant(**(given | changes))


@pytest.mark.parametrize("dimension", [-1, 1])
def test_the_last_dimension_is_gated_whatever_its_name(dimension: int) -> None:
    assert all(map(torch.equal, _gated(activate_dim=dimension), _gated()))


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (_rows, {"input": torch.ones(3, 8).double()}, "input is .*float64"),
        (_rows, {"input": torch.ones(8)}, "input is .*; supported: .* two or more dimensions, H above 0"),
        (_rows, {"input": torch.ones(3, 0)}, "input is .*; supported: .* two or more dimensions, H above 0"),
        (_rows, {"dst_type": 2}, r"dst_type is 2; supported: torch.int8 \(1\)"),
        (_rows, {"smooth_scales": torch.ones(7)}, r"smooth_scales is .* of shape \(8,\)"),
        (_rows, {"smooth_scales": torch.ones(1, 8)}, r"smooth_scales is .*; supported: shape \(8,\)$"),
        (_rows, {"smooth_scales": torch.ones(8).half()}, "smooth_scales is .*; supported: torch.float32 of"),
        (_normed, {"x1": torch.ones(3, 8).double()}, "x1 is .*float64"),
        (_normed, {"x2": torch.ones(3, 8).half()}, "x2 is .* the dtype of the first"),
        (_normed, {"gamma": torch.ones(8).half()}, "gamma is .* the dtype of the first"),
        *((_normed, {"x2": torch.ones(shape)}, r"x2 is .* the shape of x1, \(3, 8\)")
          for shape in ((1, 8), (2, 8), (4, 8), (3, 7), (3, 9), (1, 3, 8))),
        (_normed, {"x1": torch.ones(8), "x2": torch.ones(8)}, "x2 is .* two or more dimensions"),
        (_normed, {"gamma": torch.ones(7)}, r"gamma is .*; supported: shape \(8,\)"),
        (_normed, {"gamma": torch.ones(9)}, r"gamma is .*; supported: shape \(8,\)"),
        (_normed, {"gamma": torch.ones(1, 8)}, r"gamma is .*; supported: shape \(8,\)"),
        *((_normed, {"output_mask": mask}, "output_mask is .*; supported: None or")
          for mask in ([True, True], [False, True], [True], [])),
        (_normed, {"y_dtype": 2}, "y_dtype is 2; supported: "),
        *((_gated, {"quant_mode": mode}, f"quant_mode is {mode}; supported: 1") for mode in (0, 2)),
        (_gated, {"dst_type": 2}, "dst_type is 2; supported: "),
        (_gated, {"round_mode": 1}, "round_mode is 1; supported: 0"),
        (_gated, {"activate_dim": 0}, "activate_dim is 0; supported: -1"),
        *((_gated, {"x": torch.ones(shape, dtype=torch.int32)}, "x is .*; supported: int32 of shape")
          for shape in (8, (1, 3, 8), (3, 7), (3, 0))),
        (_gated, {"x": torch.ones(3, 8)}, "x is .*float32.*; supported: int32 of shape"),
        (_gated, {"weight_scale": None}, r"weight_scale is None; supported: float32 of shape \(8,\)"),
        *((_gated, {"weight_scale": torch.ones(shape)}, r"weight_scale is .*of shape \(8,\) or \(1, 8\)")
          for shape in (4, (8, 1), (2, 8))),
        (_gated, {"weight_scale": torch.ones(8).bfloat16()}, "weight_scale is .*; supported: torch.float32 of"),
        *((_gated, {"activation_scale": torch.ones(shape)}, r"activation_scale is .*of shape \(3,\) or \(3, 1\)")
          for shape in (1, 2, 4, (1, 3), (3, 2))),
        (_gated, {"activation_scale": torch.ones(3).bfloat16()}, "activation_scale is .*; supported: float32 of"),
    ],
)  # fmt: skip
def test_activations_of_another_shape_or_dtype_are_refused(call: Any, changes: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=f"^npu::npu_[a-z_]+: {message}"):
        call(**changes)
