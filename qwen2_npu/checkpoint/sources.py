"""Where stock tensors and their configuration come from: a Hugging Face folder, or memory. No weights are read before
they are asked for, one at a time.
"""

from __future__ import annotations

import reprlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import Qwen2Config

from qwen2_npu.checkpoint import merged, quantized
from qwen2_npu.checkpoint.configuration import one_line, read_config
from qwen2_npu.checkpoint.folders import check_readable, locked
from qwen2_npu.checkpoint.naming import Renamed, as_stock
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.quantized import QuantizedSource, not_floating
from qwen2_npu.checkpoint.shards import is_safetensors, weights_files
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Cutting, Slice

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

COMPUTED = ("float32", "bfloat16", "float16")
"""Those of them that an NPU, and so this model, computes in."""

STORED: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
"""safetensors' names of the same dtypes. What is stored otherwise is quantised."""

STORED_INTEGERS: dict[str, torch.dtype] = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""The same for tensors of a checkpoint that says that it is quantised."""

Cuttings = Callable[[str], Sequence[Slice | None]]
"""The same for several parts of a tensor."""


def whole(name: str) -> Slice | None:
    """All of every tensor."""
    return None


class Source(Protocol):
    """Where stock tensors come from."""

    config: Qwen2Config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor and its shape, without reading data."""

    def stored_dtype(self) -> torch.dtype:
        """What the weights are stored in."""

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, or the part of it that ``cut`` says, one at a time."""


class NamedSource(Source, Protocol):
    """A source that can be asked for any of its tensors."""

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, as often as they are asked for."""


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by name or itself; None for "auto" and None.

    Raises:
        UnsupportedError: no floating dtype of that name.
    """
    if dtype is None or dtype == "auto":
        return None
    parsed = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in map(DTYPES.get, COMPUTED):
        raise UnsupportedError(f"dtype={dtype!r}; supported are {', '.join(COMPUTED)} and 'auto'")
    return parsed


def check_dtype(dtype: torch.dtype, way_out: str) -> None:
    """Refuse a dtype that this model does not compute in.

    Raises:
        UnsupportedError: with ``way_out``.
    """
    if dtype not in map(DTYPES.get, COMPUTED):
        raise UnsupportedError(
            f"the weights are {dtype}, and an NPU computes in {', '.join(COMPUTED[:-1])} and {COMPUTED[-1]} alone: "
            f"{way_out}"
        )


# ---- sources --------------------------------------------------------------------------------------------------------
class StateDictSource:
    """Stock tensors already in memory.

    Raises:
        CheckpointError: something in ``state_dict`` is not a tensor of floating-point numbers, or of what ``config``
            says that there is of integers.
    """

    def __init__(
        self, config: Qwen2Config, state_dict: Mapping[str, torch.Tensor], *, where: str = "the state dict"
    ) -> None:
        self.config = config
        self.where = where
        self._state_dict = state_dict
        known = [*DTYPES.values(), *(STORED_INTEGERS.values() if quantization_of(config) is not None else ())]
        for name, tensor in state_dict.items():
            stored = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            if stored not in known:
                raise not_floating(where, name, stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state_dict.items()}

    def stored_dtype(self) -> torch.dtype:
        return next((tensor.dtype for tensor in self._state_dict.values()), torch.float32)

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self._state_dict.items()}

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._state_dict.items():
            yield name, part_of(tensor, cut(name))

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._state_dict[name] for name in names}

    def pieces(self, cuts: Cuttings) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Every tensor with the pieces of it that ``cuts`` names."""
        for name, tensor in self._state_dict.items():
            yield name, [part_of(tensor, part) for part in cuts(name)]


class SafetensorsSource:
    """One or several safetensors files of a folder.

    They are opened at once and stay so until they are read: what replaces them meanwhile is not met.

    Raises:
        CheckpointError: a file cannot be read, is quantised and ``config`` does not say so, or has a tensor that
            another one has as well.
    """

    def __init__(self, folder: Path, config: Qwen2Config, files: Sequence[str]) -> None:
        self.config = config
        self.where = str(folder)
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._known = STORED | (STORED_INTEGERS if quantization_of(config) is not None else {})
        self._versions: dict[str, tuple[int, ...]] = {}
        for file in files:
            path = folder / file
            with _reading(path):
                self._open[file] = shard = safe_open(path, framework="pt", device="cpu")
                self._versions[file] = _version(path)
                for name in list(shard.keys()):
                    self._add(file, name, shard.get_slice(name))

    def _add(self, file: str, name: str, tensor: Any) -> None:
        dtype = self._known.get(tensor.get_dtype())
        if dtype is None:
            raise not_floating(self._folder / file, name, tensor.get_dtype())
        if (first := self._file_of.setdefault(name, file)) != file:
            raise _in_two_files(self.where, name, first, file)
        self._dtypes[name] = dtype
        self._shapes[name] = tuple(tensor.get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored_dtype(self) -> torch.dtype:
        return next(iter(self._dtypes.values()), torch.float32)

    def dtypes(self) -> dict[str, torch.dtype]:
        return self._dtypes

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        for name, pieces in self.pieces(lambda name: (cut(name),)):
            yield name, pieces.pop()

    def pieces(self, cuts: Cuttings) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Every tensor with the pieces of it that ``cuts`` names."""
        for file in dict.fromkeys(self._file_of.values()):
            with _reading(self._folder / file):
                shard = self._open.pop(file, None) or safe_open(self._folder / file, framework="pt", device="cpu")
                for name in list(shard.keys()):
                    # A slice reads its rows or columns from the file, and nothing else.
                    yield (
                        name,
                        [
                            shard.get_tensor(name) if part is None else shard.get_slice(name)[indices(part)]
                            for part in cuts(name)
                        ],
                    )

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, as often as they are asked for.

        Their files are mapped anew each time: nothing of a file is in memory once the tensors are dropped.

        Raises:
            CheckpointError: a file cannot be read, or is another one than when this source was opened.
        """
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self._file_of[name] for name in names):
            path = self._folder / file
            with _reading(path), safe_open(path, framework="pt", device="cpu") as shard:
                if _version(path) != self._versions[file]:
                    raise CheckpointError(
                        f"{path} was changed or replaced while the checkpoint was being read; start again, and leave "
                        "the folder as it is meanwhile"
                    )
                found |= {name: shard.get_tensor(name) for name in names if self._file_of[name] == file}
        return found


class FirstLayers:
    """The first ``layers`` layers of ``inner``, and all that belongs to no layer."""

    def __init__(self, inner: Source, layers: int) -> None:
        self.inner, self.layers = inner, layers
        self.config = inner.config
        self.where: str = getattr(inner, "where", type(inner).__name__)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.inner.shapes().items() if self._has(name)}

    def stored_dtype(self) -> torch.dtype:
        return self.inner.stored_dtype()

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        row = Slice(0, 0, 1)  # all that is read of the others
        for name, tensor in self.inner.tensors(lambda name: cut(name) if self._has(name) else row):
            if self._has(name):
                yield name, tensor

    def _has(self, name: str) -> bool:
        prefix, _, rest = name.partition("layers.")
        number = rest.partition(".")[0]
        return prefix != "model." or not number.isdecimal() or int(number) < self.layers


def part_of(tensor: torch.Tensor, part: Slice | None) -> torch.Tensor:
    """A view of that part of ``tensor``."""
    return tensor if part is None else tensor[indices(part)]


def indices(part: Slice) -> tuple[slice, ...]:
    """``part`` as what a tensor is indexed with."""
    return (*(slice(None),) * part.axis, slice(part.start, part.stop))


Opened = SafetensorsSource | StateDictSource | Renamed | merged.MergedSource | QuantizedSource
"""A checkpoint folder whose tensors can be asked for."""


def open_checkpoint(
    path: str | Path,
    *,
    config: Qwen2Config | None = None,
    weights_file: str | None = None,
    assume_tp: int | None = None,
    tp_size: int = 1,
    beside_adapter: bool = False,
) -> Opened:
    """Look at a checkpoint folder: configuration and tensor shapes, no weights yet. (Only a tied head that is stored
    beside the embedding is compared with it.)

    What is found is what transformers' ``from_pretrained`` finds; see :mod:`qwen2_npu.checkpoint.naming` for the names
    of tensors, and for ``tie_word_embeddings``, which the configuration of the source may have otherwise than the file.

    Args:
        weights_file: a file of weights in the folder, or an index of several; default: the safetensors ones. Pickled
            files are read by name only, with ``weights_only=True``: no code in them is run.
        assume_tp: for how many ranks q, k and v were merged, where they were and the folder does not record it.
        tp_size: how many ranks load it.
        beside_adapter: whether the folder may hold an adapter, which the caller deals with.

    Raises:
        CheckpointError: what is wrong with it.
        UnsupportedError: ``assume_tp`` contradicts it.
    """
    folder = Path(path).expanduser()
    with locked(folder, shared=True):
        config = read_config(folder) if config is None else config
        source = as_stock(open_stored(folder, config, weights_files(folder, weights_file, config, beside_adapter)))
        found: Opened = quantized.present(merged.present(source, folder, assume_tp=assume_tp, tp_size=tp_size))
        return found


def open_stored(folder: Path, config: Qwen2Config, files: Sequence[str]) -> SafetensorsSource | StateDictSource:
    """The tensors of ``files`` under the names that they are stored under.

    Raises:
        CheckpointError: what is wrong with them.
    """
    if all(map(is_safetensors, files)):
        return SafetensorsSource(folder, config, files)
    state_dict: dict[str, torch.Tensor] = {}
    file_of: dict[str, str] = {}
    for file in files:
        found = _unpickled(folder / file)
        for name in found:
            if name in file_of:
                raise _in_two_files(folder, name, file_of[name], file)
            file_of[name] = file
        state_dict |= found
    return StateDictSource(config, state_dict, where=str(folder))


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    check_readable(path)
    try:
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        state_dict = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch state dict: {one_line(error)}; fetch it again"
        ) from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path} holds a {type(state_dict).__name__} in place of a state dict; fetch it again")
    if (name := next((name for name in state_dict if not isinstance(name, str)), None)) is not None:
        raise CheckpointError(f"{path} has {reprlib.repr(name)} in place of the name of a tensor; fetch it again")
    return state_dict


def _in_two_files(where: str | Path, name: str, first: str, second: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: tensor {name} is in {first} and in {second}, which are not of one checkpoint; fetch all files again"
    )


def _version(path: Path) -> tuple[int, ...]:
    """Another one where the file is written to or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name what goes wrong while a file of weights is read."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        check_readable(path)
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({error}); fetch this file again"
        ) from error
