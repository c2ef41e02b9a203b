"""Linear layers with 8-bit weights: `w8a16` (activations stay as they are) and `w8a8` (they are quantised per token).

A weight is int8 with one scale per output channel, symmetric: ``weight · weight_scale`` is what the layer multiplies
with. Under `w8a8` the rows of the input are quantised in the same way, and the product is one of integers.

Shapes: M rows (all tokens of all sequences), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.ops.quantization import MAX_SIZE, OUTPUT_DTYPES
from qwen2_npu.parallel.collectives import Ranks

Scheme = Literal["w8a16", "w8a8"]

NUMBERS = {dtype: number for number, dtype in OUTPUT_DTYPES.items()}
"""Of the dtypes that a product has, in the operator's schema."""

RESULTS = (torch.float16, torch.bfloat16)
"""The dtypes that npu_quant_matmul scales its sums to. float32, which no NPU computes a model in, is scaled here."""

UNIFORM_STD = 73.3
"""Standard deviation of integers that are uniform in [-127, 127]."""


class QuantizedRows(NamedTuple):
    """Activations quantised per token: ``values · scale``.

    Attributes:
        values: int8 (..., K).
        scale: float32 (...).
    """

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


Activations = torch.Tensor | QuantizedRows


def quantise(x: Activations) -> QuantizedRows:
    """``x`` (..., K) quantised per token, unless it is already."""
    return x if isinstance(x, QuantizedRows) else QuantizedRows(*torch.ops.npu.npu_dynamic_quant(x))


class QuantizedLinear(nn.Module):
    """``x @ (weight · weight_scale)ᵀ + bias``.

    The operators take some vectors in float32. These copies are made by :meth:`prepare`, outside of any graph.

    Args:
        name: the module's name, for messages.

    Attributes:
        weight: int8 (N, K).
        weight_scale: (N, 1), of the model's dtype.
        bias: (N,), of the model's dtype, or None.
        wide_scale, wide_bias: (N,) float32, of the same numbers; None until :meth:`prepare`.

    Raises:
        UnsupportedError: K or N is more than the operators take.
    """

    wide_scale: torch.Tensor | None
    wide_bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, name: str) -> None:
        super().__init__()
        if max(in_features, out_features) > MAX_SIZE:
            raise UnsupportedError(
                f"{scheme}: {name} has {in_features} inputs and {out_features} outputs, and a product of 8-bit weights "
                f"takes at most {MAX_SIZE} of each: switch fused_gate_up and what needs it off, share the model among "
                "more cards, or quantise the checkpoint without this layer"
            )
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_buffer("wide_scale", None, persistent=False)
        self.register_buffer("wide_bias", None, persistent=False)

    def extra_repr(self) -> str:
        """As of nn.Linear, and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )

    def reset_parameters(self, std: float) -> None:
        """Random weights of about that standard deviation, for a model that is not read from a checkpoint."""
        self.weight.data.random_(-127, 128)
        self.weight_scale.data.fill_(std / UNIFORM_STD)
        if self.bias is not None:
            self.bias.data.zero_()
        self.wide_scale = self.wide_bias = None

    def prepare(self) -> None:
        """Have the float32 copies."""
        with torch.inference_mode(False):  # they outlive the call
            self._buffers["wide_scale"] = _constant(self.weight_scale.detach().flatten())
            self._buffers["wide_bias"] = None if self.bias is None else _constant(self.bias.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Where the model changes its dtype the copies go: they are made again of what the parameters are then."""
        super()._apply(fn, recurse)
        self.wide_scale = self.wide_bias = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.wide_scale = self.wide_bias = None

    def forward(self, input: Activations) -> torch.Tensor:
        """(..., K) -> (..., N) in the model's dtype."""
        assert self.wide_scale is not None, "QuantizedLinear.prepare() comes first"
        return self._product(input, self.weight, self.weight_scale, self.bias, self.wide_scale, self.wide_bias)

    def parts(self, inputs: Sequence[Activations], sizes: list[int]) -> list[torch.Tensor]:
        """What each of ``inputs`` gives with so many outputs of its own, in their order. There must be a bias."""
        own = (self.weight, self.weight_scale, self.bias, self.wide_scale, self.wide_bias)
        cut = [tensor.split(sizes) for tensor in own if tensor is not None]
        return [self._product(*part) for part in zip(inputs, *cut, strict=True)]

    def _product(
        self,
        input: Activations,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        wide_scale: torch.Tensor,
        wide_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype, shape = weight_scale.dtype, (*input.shape[:-1], weight.shape[0])
        if self.scheme == "w8a16":
            assert isinstance(input, torch.Tensor)
            rows = input.reshape(-1, self.in_features)
            bias = wide_bias if dtype == torch.bfloat16 else bias
            scale = weight_scale.view(1, -1)
            return torch.ops.npu.npu_weight_quant_batchmatmul(rows, weight.mT, scale, bias=bias).view(shape)
        values, token = quantise(input)
        if dtype not in RESULTS:
            y = _sums(values, weight, wide_scale).float() * wide_scale * token.reshape(-1, 1)
            return (y if wide_bias is None else y + wide_bias).view(shape)
        return torch.ops.npu.npu_quant_matmul(
            values.reshape(-1, self.in_features), weight.mT, wide_scale,
            pertoken_scale=token.reshape(-1), bias=wide_bias, output_dtype=NUMBERS[dtype],
        ).view(shape)  # fmt: skip

    def sums(self, x: QuantizedRows) -> torch.Tensor:
        """The product of the integers alone, int32 (M, N): neither scaled nor with the bias."""
        assert self.wide_scale is not None, "QuantizedLinear.prepare() comes first"
        return _sums(x.values, self.weight, self.wide_scale)


def _sums(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # The operator wants a scale for a result that it does not scale, too.
    return torch.ops.npu.npu_quant_matmul(values.flatten(0, -2), weight.mT, scale, output_dtype=NUMBERS[torch.int32])


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    """In float32; of the type by which torchair knows that its address does not change."""
    return nn.Parameter(tensor.float().clone(), requires_grad=False)


class RowParallelQuantizedLinear(QuantizedLinear):
    """As :class:`~qwen2_npu.models.layers.RowParallelLinear`: the input is cut over the ranks, the results are added.

    Each rank quantises its own part of the activations: a row has one scale per rank.
    """

    def __init__(self, in_features: int, out_features: int, ranks: Ranks, scheme: Scheme, name: str) -> None:
        super().__init__(in_features, out_features, bias=False, scheme=scheme, name=name)
        self.ranks = ranks

    def forward(self, input: Activations, phase: str = "decode") -> torch.Tensor:
        """(..., K of this rank) -> (..., N), summed over the ranks."""
        return self.ranks.all_reduce(super().forward(input))


def swiglu_quantised(gate_up: QuantizedLinear, x: Activations) -> QuantizedRows:
    """``silu(gate) · up`` of the stacked product [gate; up], quantised per token: the product is not scaled before."""
    rows = quantise(x)
    values, scale = torch.ops.npu.npu_dequant_swiglu_quant(
        gate_up.sums(rows), weight_scale=gate_up.wide_scale, activation_scale=rows.scale.reshape(-1),
        activate_left=True, quant_mode=1,
    )  # fmt: skip
    lead = x.shape[:-1]
    return QuantizedRows(values.view(*lead, -1), scale.view(lead))
