"""GE operators that pad."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2_npu.emulator.ge.operators.table import Ints, Tensor, operator

MODES = {"constant": "constant", "edge": "replicate", "reflect": "reflect", "REFLECT": "reflect"}
"""GE's name of a mode -> PyTorch's."""


def _pad(x: Tensor, paddings: Ints, mode: str, value: float) -> Tensor:
    """``paddings``: before and after, first dimension first."""
    pairs = list(zip(paddings[::2], paddings[1::2], strict=True))
    if MODES[mode] == "constant":
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], "constant", value)
    # PyTorch pads the last dimensions of an input with batch and channel in other modes; do it one by one.
    for dim, (before, after) in enumerate(pairs):
        if before or after:
            index = _source(x.shape[dim], before, after, MODES[mode])
            x = x.index_select(dim, index)
    return x.clone()


def _source(size: int, before: int, after: int, mode: str) -> Tensor:
    position = torch.arange(-before, size + after)
    if mode == "replicate":
        return position.clamp(0, size - 1)
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    return torch.where(position < size, position, period - position)


@operator("PadV3", fixed={"paddings_contiguous": True})
def pad_v3(x: Tensor, paddings: Ints, constant_values: Tensor | None, *, mode: str = "constant") -> Tensor:
    return _pad(x, paddings, mode, 0 if constant_values is None else constant_values.item())


@operator("MirrorPad")
def mirror_pad(x: Tensor, paddings: Ints, *, mode: str) -> Tensor:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not emulated")
    return _pad(x, paddings, mode, 0)
