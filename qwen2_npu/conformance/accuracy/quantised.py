"""The stock side of a checkpoint with 8-bit weights: what transformers' own class computes with the same numbers.

Weights: int8 times the scale of their row, exact in float64, rounded once to the stock model's dtype. The scale is
first rounded to the dtype that the models compute in, as every weight is: it is one.

Activations, under ``w8a8``: every row that goes into a quantised product is replaced by what int8 and one scale keep of
it. As in the stock norms and softmax, that is computed in float32 and rounded once to the model's dtype; of the float64
self in float64. A value whose quotient lies close to a half goes to one integer in one model and to its neighbour in
another: that is part of the noise, which is measured between the stock model and its float64 self like all rounding.

Several ranks: a product whose input is cut (o_proj, down_proj) gets on every rank a part of the row, and that rank
scales the part by its own maximum. No rank knows the maximum of the whole row, and to ask for it would take one more
all-reduce per product. So the function itself depends on the number of ranks, and the stock side scales the same parts.

Written without ``qwen2_npu.ops``, whose kernels it judges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.sources import NamedSource, Source, part_of, whole
from qwen2_npu.parallel.sharding import Cutting, Shard

LARGEST = 127
"""The integers are symmetric: -127 to 127."""
SCALE = "_scale"
"""What the name of a weight's scales adds to its own."""


def dequantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 (N, K) times (N, 1), exact in float64.

    Args:
        dtype: what the models compute in, to which the scale is rounded first.
    """
    return weight.double() * scale.to(dtype).double()


def kept_in_int8(rows: torch.Tensor, widths: Sequence[int] = ()) -> torch.Tensor:
    """(..., K): what one scale and int8 per row keep of it, in its dtype. A row of zeros stays.

    Args:
        widths: of the parts of a row that have a scale each; none for the whole row.
    """
    wide = rows if rows.dtype == torch.float64 else rows.float()
    parts = []
    for part in wide.split(list(widths) or wide.shape[-1], dim=-1):
        scale = part.abs().amax(dim=-1, keepdim=True) / LARGEST
        integers = torch.round(part / torch.where(scale == 0, torch.ones_like(scale), scale))
        parts.append(integers.clamp(-LARGEST, LARGEST) * scale)
    return torch.cat(parts, dim=-1).to(rows.dtype)


@dataclass(frozen=True)
class InputRounding:
    """Which products of the stock model quantise their inputs under ``w8a8``, and in how many parts.

    Attributes:
        covers: whether a module, by its stock name, has 8-bit weights.
        config: of the whole model.
        ranks: how many share it.
    """

    covers: Callable[[str], bool]
    config: Any
    ranks: int = 1

    @contextmanager
    def of(self, model: nn.Module, first_layer: int = 0) -> Iterator[None]:
        """Within it, ``model`` rounds those inputs.

        Args:
            first_layer: the number of the model's first layer, where it is a part of a larger one.
        """
        handles = []
        for name, module in model.named_modules():
            stock = _numbered_from(name, first_layer)
            if isinstance(module, nn.Linear) and self.covers(stock):
                handles.append(module.register_forward_pre_hook(_rounding(self.widths(stock))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def widths(self, module: str) -> list[int]:
        """Of the parts of an input that the ranks scale apart; empty where all have the whole of it."""
        return widths_of_parts(module, self.config, self.ranks)


def widths_of_parts(module: str, config: Any, ranks: int) -> list[int]:
    """Of the parts of a product's input that ``ranks`` hold; empty where all have the whole of it."""
    cuts = [Shard(rank, ranks).slice_of(f"{module}.weight", config) for rank in range(ranks)]
    return [cut.stop - cut.start for cut in cuts if cut is not None and cut.axis == 1]


def _rounding(widths: list[int]) -> Callable[[Any, Any], Any]:
    return lambda linear, inputs: (kept_in_int8(inputs[0], widths),)


def _numbered_from(name: str, first_layer: int) -> str:
    """The name in the whole model."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 2:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


class Dequantised:
    """A source with 8-bit weights as one of ordinary ones: those are in float64, and there are no scales.

    Args:
        inner: gives ``X.weight`` in int8 and ``X.weight_scale``.
        dtype: see :func:`dequantised`.
    """

    def __init__(self, inner: NamedSource, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype
        self.where: str = getattr(inner, "where", type(inner).__name__)
        self.config = copy.deepcopy(inner.config)
        vars(self.config).pop("quantization_config", None)
        self.scaled = {name.removesuffix(SCALE) for name in inner.shapes() if name.endswith(f".weight{SCALE}")}
        """The names of the 8-bit weights."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        scales = {name + SCALE for name in self.scaled}
        return {name: shape for name, shape in self.inner.shapes().items() if name not in scales}

    def stored_dtype(self) -> torch.dtype:
        return self.inner.stored_dtype()

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        wanted = [*names, *(name + SCALE for name in names if name in self.scaled)]
        found = self.inner.read(wanted)
        return {
            name: dequantised(found[name], found[name + SCALE], self.dtype) if name in self.scaled else found[name]
            for name in names
        }

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.shapes():
            yield name, part_of(self.read([name])[name], cut(name))


def as_meant(source: NamedSource, dtype: torch.dtype, ranks: int = 1) -> tuple[NamedSource, str, InputRounding | None]:
    """A checkpoint's tensors as the stock model has them, its scheme, and what that does to activations.

    Args:
        source: as the checkpoint is opened, of ordinary weights or of 8-bit ones.
        dtype: what the models compute in.
        ranks: how many share ours.
    """
    found = quantization_of(source.config)
    if found is None:
        return source, "", None
    meant = Dequantised(source, dtype)
    rounding = InputRounding(found.covers, meant.config, ranks) if found.scheme == "w8a8" else None
    return meant, found.scheme, rounding


def scaled_weights(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """The 8-bit weights of a source in float64, one at a time: none of ordinary ones."""
    if isinstance(source, Dequantised):
        for name in sorted(source.scaled):
            yield name, source.read([name])[name]
