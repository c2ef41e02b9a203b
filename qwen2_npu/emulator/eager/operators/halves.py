"""PyTorch's operators that CPU kernels lack in float16 or bfloat16, or sum up in it: computed in fp32, rounded once.

Hardware's kernels of these operators take halves and accumulate in fp32. An operator in a half that is in no list here
and that PyTorch's CPU kernel lacks is refused by name (``rule.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen2_npu.emulator.eager.operators.accepted import overloads, with_int32
from qwen2_npu.emulator.eager.plan import WRITTEN_UNDECLARED

Tensor = torch.Tensor

FLOAT16 = (torch.float16,)
HALVES = (torch.float16, torch.bfloat16)

NO_CPU_KERNEL: dict[str, tuple[torch.dtype, ...]] = {
    "avg_pool3d": HALVES,
    "avg_pool3d_backward": HALVES,
    "_upsample_bilinear2d_aa": HALVES,
    "_upsample_bilinear2d_aa_backward": HALVES,
    "multilabel_margin_loss_forward": HALVES,
    "rrelu_with_noise": FLOAT16,
    "rrelu_with_noise_": FLOAT16,
    "cdist": FLOAT16,
    "_cdist_forward": FLOAT16,
    "_cdist_backward": FLOAT16,
    "_ctc_loss": FLOAT16,
    "_ctc_loss_backward": FLOAT16,
    "_pdist_forward": FLOAT16,
    "inverse": FLOAT16,
    "linalg_qr": FLOAT16,
}
"""Operator -> the halves that its NPU kernel takes and PyTorch's CPU kernel does not."""

INT32 = {"multilabel_margin_loss_forward": "target"}
"""Those of ``NO_CPU_KERNEL`` with an argument of indices, which may be int32."""

ROUNDED_MIDWAY: dict[str, tuple[str | None, ...]] = {
    "native_batch_norm": ("input", None, None),
    "_native_batch_norm_legit": ("input", None, None),
    "native_batch_norm_backward": ("input", "weight", "weight"),
    "convolution": ("input",),
    "convolution_overrideable": ("input",),
    "convolution_backward": ("input", "weight", "weight"),
    "convolution_backward_overrideable": ("input", "weight", "weight"),
    "native_layer_norm_backward": ("input", "weight", "bias"),
    "embedding_dense_backward": ("grad_output",),
    "grid_sampler_2d": ("input",),
    "grid_sampler_2d_backward": ("input", "grid"),
    "grid_sampler_3d": ("input",),
    "grid_sampler_3d_backward": ("input", "grid"),
}
"""Operator that PyTorch's CPU kernel computes with roundings on the way -> whose dtype each result has; None: fp32."""


def in_fp32(
    op: torch._ops.OpOverload,
    dtypes: Sequence[torch.dtype] = HALVES,
    like: Sequence[str | None] = (),
) -> Callable[..., Any]:
    """``op`` computed in fp32 where it is given one of ``dtypes``.

    Args:
        like: for each result, the argument whose dtype it has; None leaves it in fp32. Results beyond these have the
            dtype of the first half among the arguments.
    """
    schema = op._schema
    names = [argument.name for argument in schema.arguments]
    written = [
        argument.name
        for argument in schema.arguments
        if (argument.alias_info and argument.alias_info.is_write) or argument.name in WRITTEN_UNDECLARED
    ]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        halves = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dtype in dtypes}
        if not halves:
            return op(*args, **kwargs)
        wide = {**given, **{name: value.float() for name, value in halves.items()}}
        results = op(**wide)
        outputs = [(halves[name], wide[name]) for name in written if name in halves]
        for target, result in outputs:  # before anything is written: where it is an error, the rule calls again
            if target.shape != result.shape:
                target.resize_(result.shape)
        for target, result in outputs:
            target.copy_(result)
        first = next(iter(halves.values())).dtype

        def rounded(index: int, result: Any) -> Any:
            for name in written:
                if result is wide[name]:
                    return given[name]
            if not isinstance(result, Tensor) or result.dtype is not torch.float32:
                return result
            if index >= len(like):
                return result.to(first)
            owner = given.get(like[index] or "")
            return result.to(owner.dtype) if owner is not None else result

        if isinstance(results, tuple):
            return tuple(rounded(index, result) for index, result in enumerate(results))
        return rounded(0, results)

    return run


def multilabel_margin_loss_out(*args: Any, output: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """torch_npu gives ``is_target`` in the dtype of the target."""
    results = TABLE["multilabel_margin_loss_forward"](*args)
    for target, result in zip((output, is_target), results, strict=True):
        target.resize_(result.shape).copy_(result)
    return output, is_target


TABLE: dict[str, Callable[..., Any]] = {
    **{
        qualified: with_int32(op, INT32[name], in_fp32(op, dtypes)) if name in INT32 else in_fp32(op, dtypes)
        for name, dtypes in NO_CPU_KERNEL.items()
        for qualified, op in overloads(name).items()
    },
    **{
        qualified: in_fp32(op, like=like)
        for name, like in ROUNDED_MIDWAY.items()
        for qualified, op in overloads(name).items()
    },
    "multilabel_margin_loss_forward.output": multilabel_margin_loss_out,
}
