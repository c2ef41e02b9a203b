"""Operators in float16 and bfloat16: one rounding away from fp64, results and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from qwen2_npu.emulator.eager import registration, tap
from qwen2_npu.emulator.eager.operators import halves

Tensor = torch.Tensor

BOTH = [torch.float16, torch.bfloat16]
ZEROS = torch.zeros(600, dtype=torch.int64)
TARGETS = torch.tensor([[1, 0, -1, 2], [2, -1, 0, 0]])


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True)


def batch_norm_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    return F.batch_norm(x, mean, var, weight, bias, True, 0.5), mean, var


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=8)


def antialiased(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)


def ctc(x: Tensor) -> Tensor:
    return F.ctc_loss(x, torch.tensor([[1, 2], [2, 3]], device=x.device), (6, 6), (2, 2), reduction="none")


CASES = {
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 3, 1, 1), [rand(2, 3, 5, 5, 5)], BOTH, 0.51),
    "upsample": (antialiased, [rand(2, 3, 9, 9)], BOTH, 0.51),
    "multilabel": (lambda x: F.multilabel_margin_loss(x, TARGETS.to(x.device)), [rand(2, 4)], BOTH, 0),
    "cdist": (torch.cdist, [rand(5, 8), rand(6, 8)], BOTH[:1], 1.5),
    "pdist": (F.pdist, [rand(5, 8)], BOTH[:1], 0),
    "ctc": (ctc, [rand(6, 2, 4).log_softmax(-1)], BOTH[:1], 5),
    "inverse": (torch.inverse, [rand(4, 4) + 3 * torch.eye(4)], BOTH[:1], 0),
    "qr": (lambda x: torch.linalg.qr(x)[1].abs(), [rand(5, 4)], BOTH[:1], 0),
    "batch_norm": (batch_norm, [rand(64, 8, 14, 14), rand(8), rand(8)], BOTH, 0.51),
    "running_batch_norm": (batch_norm_in_place, [rand(64, 8, 5), rand(8), rand(8)], BOTH, 0),
    "instance_norm": (F.instance_norm, [rand(8, 3, 14, 14)], BOTH, 0.51),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (16,), w, b), [rand(512, 16), rand(16), rand(16)], BOTH, 0.51),
    "depthwise": (depthwise, [rand(16, 8, 28, 28), rand(8, 1, 3, 3), rand(8)], BOTH, 0.51),
    "conv2d": (F.conv2d, [rand(8, 8, 28, 28), rand(8, 8, 3, 3), rand(8)], BOTH, 0.51),
    "conv_transpose2d": (F.conv_transpose2d, [rand(8, 8, 28, 28), rand(8, 8, 3, 3), rand(8)], BOTH, 0.51),
    "conv3d": (F.conv3d, [rand(2, 8, 9, 9, 9), rand(8, 8, 3, 3, 3), rand(8)], BOTH, 0.51),
    "embedding": (lambda w: F.embedding(ZEROS.to(w.device), w), [rand(4, 16)], BOTH, 0.51),
    "grid_sample": (
        lambda x, g: F.grid_sample(x, g, align_corners=False), [rand(2, 4, 9, 9), rand(2, 5, 5, 2) / 3], BOTH, 0.51
    ),
    "grid_sample_3d": (
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        [rand(2, 3, 5, 5, 5), rand(2, 4, 4, 4, 3) / 3], BOTH, 0.51,
    ),
}  # fmt: skip
"""Name -> (function, its arguments, the halves it takes, ulps that gradients may be off; 0: they are not compared).

An ulp is that of the largest element. Gradients of cdist and CTC are computed from rounded results.
"""


def both(function, arguments, dtype, differentiate: bool):
    """Results and gradients on the emulated NPU in ``dtype``, and on the CPU in float64."""
    found = []
    for device, kind in (("npu", dtype), ("cpu", torch.float64)):
        leaves = [value.to(dtype).to(device, kind).requires_grad_(differentiate) for value in arguments]
        results = tree_leaves(function(*leaves))
        if differentiate:
            weights = torch.linspace(-1, 2, results[0].numel()).to(dtype).view(results[0].shape)
            results += torch.autograd.grad(results[0], leaves, weights.to(device, kind))
        found.append([result.detach().cpu() for result in results])
    return found


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, (*_, dtypes, _ulps) in CASES.items() for dtype in dtypes], ids=str
)
def test_one_rounding(name, dtype):
    function, arguments, _, ulps = CASES[name]
    found, wanted = both(function, arguments, dtype, ulps > 0)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype is dtype, f"result {index}"
        # Half an ulp, and what fp32 adds to it.
        bound = (ulps if ulps and index else 0.51) * torch.finfo(dtype).eps * other.abs().max()
        assert (one.double() - other).abs().max() <= bound, f"result {index}"


@pytest.fixture
def reached(monkeypatch):
    found: set[str] = set()

    def listen(plan, run, args, kwargs):
        found.add(plan.op._schema.name.partition("::")[2])
        return run(*args, **kwargs)

    monkeypatch.setattr(tap, "listeners", [*tap.listeners, listen])
    return found


NOT_REACHED = {
    "rrelu_with_noise", "rrelu_with_noise_",  # random: below
    "_cdist_forward",  # torch_npu takes cdist as a whole
    "_native_batch_norm_legit",  # torch_npu takes native_batch_norm
    "convolution_overrideable", "convolution_backward_overrideable",  # PyTorch's names for the same kernels
}  # fmt: skip


def test_every_operator_of_the_lists_has_a_case(reached):
    for function, arguments, dtypes, ulps in CASES.values():
        both(function, arguments, dtypes[0], ulps > 0)
    assert (halves.NO_CPU_KERNEL.keys() | halves.ROUNDED_MIDWAY.keys()) - reached == NOT_REACHED


def test_the_lists_hold_operators_of_the_device():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(registration.KEY)
    }
    assert halves.NO_CPU_KERNEL.keys() | halves.ROUNDED_MIDWAY.keys() <= registered


def test_random_rrelu_in_halves():
    x = rand(100).half()
    y = F.rrelu(x.npu(), 0.25, 0.5, training=True).cpu()
    assert torch.equal(y[x >= 0], x[x >= 0])
    slopes = (y / x)[x < 0].float()
    assert slopes.min() >= 0.249
    assert slopes.max() <= 0.501
    assert slopes.std() > 0.02
    in_place = x.npu()
    assert F.rrelu_(in_place, 0.25, 0.5, training=True) is in_place
    assert in_place.dtype is torch.float16
    assert (in_place.cpu()[x < 0] / x[x < 0]).max() <= 0.501


@pytest.mark.parametrize("size", [(4, 4), (0,)])
def test_out_is_written_and_resized(size):
    x = (rand(4, 4) + 3 * torch.eye(4)).half()
    out = torch.empty(size, dtype=torch.float16, device="npu")
    assert torch.inverse(x.npu(), out=out) is out
    assert torch.equal(out.cpu(), x.float().inverse().half())


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_running_statistics_move_once_where_results_are_resized():
    x, weight = rand(16, 3, 5).half(), torch.ones(3).half()
    mean, var = torch.zeros(3).half().npu(), torch.ones(3).half().npu()
    outs = [torch.empty(2, dtype=torch.float16, device="npu"), *(torch.empty(3, device="npu") for _ in range(2))]
    arguments = x.npu(), weight.npu(), weight.npu(), mean, var, True, 0.5, 1e-5
    torch.ops.aten.native_batch_norm.out(*arguments, out=outs[0], save_mean=outs[1], save_invstd=outs[2])
    assert outs[0].shape == x.shape
    torch.testing.assert_close(mean.cpu(), (0.5 * x.float().mean((0, 2))).half())


def test_float32_is_left_alone():
    x = rand(2, 3, 5, 5, 5)
    assert torch.equal(F.avg_pool3d(x.npu(), 2).cpu(), F.avg_pool3d(x, 2))


@pytest.mark.parametrize("dtype", halves.HALVES)
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype):
    """Weights of norms may be in fp32 beside halves."""
    x, channels, columns = rand(4, 3, 5).to(dtype).npu(), torch.ones(3).npu(), torch.ones(5).npu()
    _, *saved = torch.native_layer_norm(x, [5], columns, columns, 1e-5)
    layer = torch.ops.aten.native_layer_norm_backward(x, x, [5], *saved, columns, columns, [True] * 3)
    _, *saved = torch.native_batch_norm(x, channels, channels, None, None, True, 0.1, 1e-5)
    batch = torch.ops.aten.native_batch_norm_backward(x, x, channels, None, None, *saved, True, 1e-5, [True] * 3)
    for found in (layer, batch):
        assert [value.dtype for value in found] == [dtype, torch.float32, torch.float32]


def test_the_statistics_of_a_batch_stay_in_fp32():
    x, weight = rand(4, 3, 5).half().npu(), torch.ones(3).half().npu()
    _, mean, invstd = torch.native_batch_norm(x, weight, weight, None, None, True, 0.1, 1e-5)
    assert mean.dtype is invstd.dtype is torch.float32
    torch.testing.assert_close(mean.cpu(), x.cpu().float().mean((0, 2)))


@pytest.mark.parametrize(
    ("function", "dtype", "name"),
    [
        (torch.linalg.cholesky, torch.float16, "aten.linalg_cholesky.default"),
        (torch.inverse, torch.bfloat16, "aten.inverse.default"),
        (lambda x: torch.cdist(x, x), torch.bfloat16, "aten.cdist.default"),
    ],
)
def test_what_hardware_has_no_kernel_for_is_refused_by_name(function, dtype, name):
    with pytest.raises((NotImplementedError, RuntimeError), match=f"{name} is not supported on the emulated NPU for"):
        function(torch.eye(3).to(dtype).npu())
