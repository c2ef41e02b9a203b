"""Checkpoints with 8-bit weights: ``X.weight`` int8 (N, K) and ``X.weight_scale`` (N, 1), however the files hold them.

All scales are read and checked when a checkpoint is opened: of the largest model they are 14 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qwen2_npu.checkpoint.merged import MergedSource, Tensors
from qwen2_npu.checkpoint.packing import PER_WORD, dequantise, pack, unpack, words
from qwen2_npu.checkpoint.quantization import FIELD, Quantization, quantization_of
from qwen2_npu.errors import CheckpointError
from qwen2_npu.parallel.sharding import OF_SCALE, Cutting, Slice

WEIGHT, SCALE = "weight", f"weight{OF_SCALE}"
PACKED_WEIGHT, SHAPE = "weight_packed", "weight_shape"
"""Tensors of a quantised module: the two that a model has, and those of a file in which the integers are packed."""

INTEGERS = (torch.int8,)
KINDS: dict[str, tuple[torch.dtype, ...]] = {
    PACKED_WEIGHT: (torch.int32,),
    SCALE: (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    SHAPE: (torch.int64, torch.int32),
}
"""What a weight is stored as, and the other tensors of a quantised module."""

UNSERVED = {
    "weight_zero_point": "zero points of integers that are not symmetric",
    "weight_g_idx": "the order of columns (actorder)",
    "weight_global_scale": "a scale of all channels",
    "input_scale": "scales of activations",
    "input_zero_point": "zero points of activations",
    "input_global_scale": "scales of activations",
    "output_scale": "scales of activations",
    "k_scale": "scales of the KV cache",
    "v_scale": "scales of the KV cache",
    "bitmask": "weights that are stored sparsely",
}
"""Tensors of schemes that are not served -> what they are."""

AGAIN = "fetch it again, or quantise the checkpoint again with `qwen2-npu quantize`"


def not_floating(where: object, name: str, stored: object) -> CheckpointError:
    """The error for a tensor that is no weight in floating-point numbers, where it should be one."""
    return CheckpointError(
        f"{where}: {name} is stored as {stored}, which is quantised or no weight; use the checkpoint in bf16, fp16 or "
        f"fp32, or with a configuration whose {FIELD} says how it is quantised"
    )


def present(source: Any) -> Any:
    """``source`` as a :class:`QuantizedSource` where its configuration says that it has 8-bit weights.

    Args:
        source: tensors under stock names, as they are stored.

    Raises:
        CheckpointError: another scheme than those that are served, or tensors that do not fit it.
    """
    quantization = quantization_of(source.config)
    if quantization is not None and isinstance(source, MergedSource):
        raise CheckpointError(
            f"{source.where} has merged q, k and v in floating-point numbers, and {FIELD} in its config.json; remove "
            f"{FIELD}, or quantise the ordinary checkpoint with `qwen2-npu quantize`"
        )
    return source if quantization is None else QuantizedSource(source, quantization)


class QuantizedSource:
    """The stock tensors of a checkpoint with 8-bit weights: a :class:`~qwen2_npu.checkpoint.sources.NamedSource`.

    Args:
        inner: the tensors as they are stored.

    Raises:
        CheckpointError: a tensor does not fit ``quantization``, or a scale is no positive number.
    """

    def __init__(self, inner: Tensors, quantization: Quantization) -> None:
        self.inner, self.quantization = inner, quantization
        self.config, self.where = inner.config, inner.where
        self._stored: dict[str, str] = {}
        """Name of a quantised weight -> the name that it is stored under."""
        dtypes = inner.dtypes()
        for name, dtype in dtypes.items():
            self._take(name, dtype)
        scales = {name: name.removesuffix(WEIGHT) + SCALE for name in self._stored}
        for name, scale in scales.items():
            if scale not in dtypes:
                raise self._fault(f"{scale} is missing, and {self._stored[name]} is there", AGAIN)
        self._dtype = next(
            (kind for name, kind in dtypes.items() if kind.is_floating_point and not name.endswith(OF_SCALE)),
            torch.float32,
        )
        self._shapes = {name: shape for name, shape in inner.shapes().items() if not name.endswith(SHAPE)}
        self._unpack_shapes()
        found = inner.read(list(scales.values()))
        self._scales = {scale: self._checked(name, scale, found[scale]) for name, scale in scales.items()}

    def _take(self, name: str, dtype: torch.dtype) -> None:
        """Sort a stored tensor in, where it is of the kind that it has to be."""
        module, _, kind = name.rpartition(".")
        covered, stored = self.quantization.covers(module), str(dtype).removeprefix("torch.")
        if kind in UNSERVED:
            raise self._fault(f"{name} holds {UNSERVED[kind]}, which is not served", AGAIN)
        if kind in KINDS and not covered:
            raise self._fault(
                f"{name} is there, and {FIELD} does not say that {module} is quantised, or this model does not have it "
                "in 8 bits",
                "quantise the checkpoint again, with that module in ignore",
            )
        expected = INTEGERS if kind == WEIGHT else KINDS.get(kind)
        if covered and expected is not None and dtype not in expected:
            kinds = " or ".join(str(each).removeprefix("torch.") for each in expected)
            way_out = f"add {module} to ignore in {FIELD} if it is not quantised, or {AGAIN}"
            raise self._fault(f"{name} is stored as {stored}, and {FIELD} says {kinds}", way_out)
        if covered and kind in {WEIGHT, PACKED_WEIGHT}:
            if (other := self._stored.setdefault(f"{module}.{WEIGHT}", name)) != name:
                raise self._fault(f"{other} and {name} are both there, and are one weight", AGAIN)
        elif kind != SHAPE and not dtype.is_floating_point:
            raise not_floating(self.where, name, stored)

    def _unpack_shapes(self) -> None:
        """Give packed weights the shapes that they are recorded with, where those fit."""
        recorded = {name: name.removesuffix(WEIGHT) + SHAPE for name in self._stored if self._is_packed(name)}
        there = self.inner.shapes()
        for name, shape in recorded.items():
            if shape not in there:
                raise self._fault(f"{shape} is missing, and {self._stored[name]} is there", AGAIN)
        found = self.inner.read(list(recorded.values()))
        for name in recorded:
            stored = self._stored[name]
            sizes, packed = found[recorded[name]].tolist(), self._shapes.pop(stored)
            if not isinstance(sizes, list) or len(sizes) != 2 or min(sizes) < 1:
                raise self._fault(f"{recorded[name]} is {sizes}, and must be two positive sizes", AGAIN)
            if packed != (sizes[0], words(sizes[1])):
                raise self._fault(
                    f"{stored} has shape {packed}, and {recorded[name]} is {sizes}: with {PER_WORD} integers in an "
                    f"int32 that is {(sizes[0], words(sizes[1]))}",
                    AGAIN,
                )
            self._shapes[name] = (sizes[0], sizes[1])

    def _checked(self, weight: str, name: str, scale: torch.Tensor) -> torch.Tensor:
        """A copy of those scales, where they can be.

        Raises:
            CheckpointError: they have another shape than one per row of ``weight``, or not all are positive numbers.
        """
        expected = (*self._shapes[weight][:1], 1)
        if tuple(scale.shape) != expected:
            raise self._fault(f"{name} has shape {tuple(scale.shape)}, and one scale per row is {expected}", AGAIN)
        _check_scale(scale, f"{self.where}: {name}", AGAIN)
        return scale.clone()  # not a view, which would keep the whole file mapped

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored_dtype(self) -> torch.dtype:
        """What is not quantised is stored in."""
        return self._dtype

    def tensors(self, cut: Cutting = lambda name: None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stock tensor, or the part of it that ``cut`` says, one at a time. Scales come right before weights."""
        stock = {stored: name for name, stored in self._stored.items()}

        def wanted(stored: str) -> list[Slice | None]:
            if stored in self._scales or stored.endswith(SHAPE):
                return []
            part = cut(stock.get(stored, stored))
            return [_of_words(part) if stored.endswith(PACKED_WEIGHT) else part]

        for stored, pieces in self.inner.pieces(wanted):
            if not pieces:
                continue
            name, tensor = stock.get(stored, stored), pieces.pop()
            if stored in stock:
                scale = name.removesuffix(WEIGHT) + SCALE
                rows = cut(scale)
                yield scale, self._scales[scale] if rows is None else self._scales[scale][rows.start : rows.stop]
                tensor = self._integers(name, tensor, cut(name))
            yield name, tensor

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, as often as they are asked for."""
        found = self.inner.read([self._stored.get(name, name) for name in names])
        return {
            name: self._integers(name, found[self._stored[name]], None) if name in self._stored else found[name]
            for name in names
        }

    def _integers(self, name: str, stored: torch.Tensor, part: Slice | None) -> torch.Tensor:
        """A weight, or a part of it, as int8, of what was read of it."""
        if not self._is_packed(name):
            return stored
        if part is None or part.axis == 0:
            return unpack(stored, self._shapes[name][1])
        return unpack(stored, part.stop - part.start, part.start % PER_WORD)

    def _is_packed(self, name: str) -> bool:
        return self._stored[name].endswith(PACKED_WEIGHT)

    def _fault(self, fault: str, way_out: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {fault}; {way_out}")


def _of_words(part: Slice | None) -> Slice | None:
    """The int32 that hold a part of packed integers."""
    if part is None or part.axis == 0:
        return part
    return Slice(part.axis, part.start // PER_WORD, words(part.stop))


def scale_in(dtype: torch.dtype, scale: torch.Tensor, name: str) -> torch.Tensor:
    """Scales in the dtype that a model is read in.

    Raises:
        CheckpointError: one of them is 0 or infinite in it.
    """
    converted = scale.to(dtype)
    _check_scale(converted, f"{name} in {dtype}", "load the checkpoint with dtype='bfloat16' or 'float32'")
    return converted


def _check_scale(scale: torch.Tensor, what: str, way_out: str) -> None:
    """Refuse a scale that no weight can have."""
    wrong = ~(torch.isfinite(scale) & (scale > 0)).flatten()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{what} is {scale.flatten()[row].item()} in row {row} ({int(wrong.sum())} such rows), and a scale must be "
            f"a finite number above 0; {way_out}"
        )


class Dequantized:
    """The tensors of ``inner`` with 8-bit weights as floating-point numbers, and without their scales.

    Args:
        inner: gives the scale of a weight right before the weight, as :class:`QuantizedSource` does.
        dtype: of those weights.
    """

    def __init__(self, inner: Any, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype
        self.config: Any = inner.config
        self.where: str = getattr(inner, "where", type(inner).__name__)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.inner.shapes().items() if not name.endswith(OF_SCALE)}

    def stored_dtype(self) -> torch.dtype:
        return self.inner.stored_dtype()

    def tensors(self, cut: Cutting = lambda name: None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, or the part of it that ``cut`` says, one at a time."""
        scale: torch.Tensor | None = None
        for name, tensor in self.inner.tensors(cut):
            if name.endswith(OF_SCALE):
                scale = scale_in(self.dtype, tensor, name)
                continue
            yield name, tensor if scale is None else dequantise(tensor, scale, self.dtype)
            scale = None


# ---- writing ---------------------------------------------------------------------------------------------------------
def stored_sizes(tensors: Mapping[str, torch.Tensor], packed: bool) -> dict[str, torch.Tensor]:
    """Every tensor of a file, without data, for a model's stock tensors.

    Args:
        packed: whether 8-bit weights are packed in it.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not (packed and tensor.dtype == torch.int8):
            found[name] = torch.empty_like(tensor, device="meta")
            continue
        module, shape = name.removesuffix(WEIGHT), tensor.shape
        found[module + PACKED_WEIGHT] = torch.empty(shape[0], words(shape[1]), dtype=torch.int32, device="meta")
        found[module + SHAPE] = torch.empty(2, dtype=torch.int64, device="meta")
    return found


def stored_tensor(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One of them, in the CPU's memory."""
    if name in tensors:
        return tensors[name].to("cpu").contiguous()
    module, _, kind = name.rpartition(".")
    weight = tensors[f"{module}.{WEIGHT}"]
    return pack(weight.to("cpu")) if kind == PACKED_WEIGHT else torch.tensor(weight.shape)
