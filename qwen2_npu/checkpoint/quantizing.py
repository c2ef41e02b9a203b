"""`qwen2-npu quantize`: what a folder with 8-bit weights consists of. It is written by ``merging``.

The integers and scales of a weight stand in the file that the weight stood in. They are computed while they are
written, some rows at a time, and once more when the file is compared with what it is made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen2_npu.checkpoint import byte_ranges, merged, merging
from qwen2_npu.checkpoint.byte_ranges import Stored, chunks
from qwen2_npu.checkpoint.configuration import CONFIG_FILE, read_config
from qwen2_npu.checkpoint.folder_plan import FolderPlan, Spec, plan_of, read_text, separate, unmerged, with_first
from qwen2_npu.checkpoint.folders import QUANTISING, locked
from qwen2_npu.checkpoint.naming import HEAD
from qwen2_npu.checkpoint.packing import integers_of, pack, scales_of, words
from qwen2_npu.checkpoint.quantization import FIELD, FORMATS, PACKED, PATTERN, PRODUCT, described, quantization_of
from qwen2_npu.checkpoint.quantized import PACKED_WEIGHT, SCALE, SHAPE, WEIGHT
from qwen2_npu.checkpoint.sources import STORED
from qwen2_npu.checkpoint.weights import stock_shapes
from qwen2_npu.compat import expert_count
from qwen2_npu.errors import CheckpointError, UnsupportedError

SCHEMES = tuple(FORMATS)
"""What a checkpoint can be quantised to."""

HEAD_MODULE = HEAD.removesuffix(f".{WEIGHT}")


# ---- what is computed ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Computed:
    """Bytes that follow from a stored weight: a :class:`~qwen2_npu.checkpoint.byte_ranges.ByteSource`.

    Attributes:
        name: of the weight, for messages.
        kind: "weight" for the integers, "weight_packed" for the same four in an int32, "weight_scale".
    """

    name: str
    stored: Stored
    kind: str

    @property
    def size(self) -> int:
        rows, columns = self.stored.shape
        return {
            WEIGHT: rows * columns,
            PACKED_WEIGHT: rows * words(columns) * 4,
            SCALE: rows * STORED[self.stored.dtype].itemsize,
        }[self.kind]

    def content(self) -> Iterator[bytes]:
        """The bytes, those of some rows at a time.

        Raises:
            CheckpointError: the weight cannot be read, or is not finite.
        """
        rows, columns = self.stored.shape
        dtype = STORED[self.stored.dtype]
        step = max(1, byte_ranges.CHUNK // (columns * dtype.itemsize))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            read = bytearray().join(chunks(self.stored.rows(start, stop)))
            weight = torch.frombuffer(read, dtype=dtype).view(stop - start, columns)
            scale = scales_of(weight)
            if not bool(torch.isfinite(scale).all()):
                row = start + int((~torch.isfinite(scale)).flatten().nonzero()[0])
                raise CheckpointError(
                    f"{self.stored.bytes.path}: {self.name} has a value in row {row} that is NaN or infinite, which no "
                    "integer stands for: correct the checkpoint, or leave that weight as it is with --ignore "
                    f"{self.name.removesuffix(f'.{WEIGHT}')}, into a new folder"
                )
            found = scale if self.kind == SCALE else integers_of(weight, scale)
            found = pack(found) if self.kind == PACKED_WEIGHT else found
            yield found.contiguous().view(torch.uint8).numpy().tobytes()


class Bytes(NamedTuple):
    """Bytes in memory: a :class:`~qwen2_npu.checkpoint.byte_ranges.ByteSource`."""

    held: bytes

    @property
    def size(self) -> int:
        return len(self.held)

    def content(self) -> Iterator[bytes]:
        """All of them."""
        yield self.held


def _tensors(name: str, stored: Stored, scheme: str) -> dict[str, Spec]:
    """What stands in place of a weight."""
    module, (rows, columns) = name.removesuffix(WEIGHT), stored.shape
    scale: Spec = (stored.dtype, (rows, 1), [Computed(name, stored, SCALE)])
    if FORMATS[scheme] != PACKED:
        return {name: ("I8", stored.shape, [Computed(name, stored, WEIGHT)]), module + SCALE: scale}
    shape = torch.tensor(stored.shape, dtype=torch.int64).numpy().tobytes()
    return {
        module + PACKED_WEIGHT: ("I32", (rows, words(columns)), [Computed(name, stored, PACKED_WEIGHT)]),
        module + SCALE: scale,
        module + SHAPE: ("I64", (2,), [Bytes(shape)]),
    }


# ---- the folder ------------------------------------------------------------------------------------------------------
class QuantizePlan(NamedTuple):
    """A folder with 8-bit weights that is to be written.

    Attributes:
        folder: its files.
        quantised, kept: its linear layers, with 8-bit weights and as they are.
        before, after: bytes of all weights.
    """

    folder: FolderPlan
    quantised: tuple[str, ...]
    kept: tuple[str, ...]
    before: int
    after: int


def plan_quantize(source: str | Path, output: str | Path, *, scheme: str, ignore: Sequence[str] = ()) -> QuantizePlan:
    """What quantising the checkpoint in ``source`` writes to ``output``. Nothing is written yet.

    Args:
        scheme: one of :data:`SCHEMES`.
        ignore: linear layers to keep as they are, beside lm_head: names, dotted parts of names ("down_proj",
            "layers.0"), or patterns after "re:".

    Raises:
        CheckpointError: what is wrong with ``source`` or ``output``; ``source`` is quantised already, or merged.
        UnsupportedError: a mixture of experts; layers to ignore that there are not, or that leave a fused product half
            quantised.
    """
    if scheme not in SCHEMES:
        raise UnsupportedError(f"scheme={scheme!r}: there are {' and '.join(SCHEMES)}")
    folder = separate(source, output)
    with locked(folder, shared=True):
        config = read_config(folder)
        _check_model(config, folder)
        _, headers = unmerged(folder, config, _merged)

    modules = [name.removesuffix(f".{WEIGHT}") for name in stock_shapes(config) if name.endswith(f".{WEIGHT}")]
    products = [module for module in modules if PRODUCT.fullmatch(module)]
    kept = _kept(products, ignore)
    if len(kept) == len(products):
        raise UnsupportedError(f"--ignore {' '.join(ignore)}: no linear layer is left to be quantised; ignore fewer")
    said = described(scheme, (HEAD_MODULE, *kept))
    setattr(config, FIELD, said)
    try:
        quantization_of(config)
    except CheckpointError as error:
        raise UnsupportedError(f"--ignore {' '.join(ignore)}: {error}") from error
    quantised = tuple(module for module in products if module not in kept)
    weights = {f"{module}.{WEIGHT}" for module in quantised}
    new: dict[str, dict[str, Spec]] = {file: {} for file in headers}
    for file, (_, tensors) in headers.items():
        for name, each in tensors.items():
            as_it_is: dict[str, Spec] = {name: (each.dtype, each.shape, [each.bytes])}
            new[file] |= _tensors(name, each, scheme) if name in weights else as_it_is
    plan = plan_of(
        folder, output, {"quantize": scheme, "ignore": list(kept)}, headers, new,
        config_text=_with_field(read_text(folder / CONFIG_FILE), said), mark=QUANTISING,
    )  # fmt: skip
    before = sum(each.bytes.size for _, tensors in headers.values() for each in tensors.values())
    after = sum(part.size for tensors in new.values() for _, _, parts in tensors.values() for part in parts)
    return QuantizePlan(plan, quantised, (*kept, HEAD_MODULE), before, after)


def quantize(
    model_path: str | Path,
    output_path: str | Path,
    *,
    scheme: str,
    ignore: Sequence[str] = (),
    progress: merging.Progress = lambda *state: None,
) -> None:
    """Write the checkpoint in ``model_path`` with 8-bit weights to ``output_path``; see :func:`plan_quantize`.

    Raises:
        CheckpointError: what is wrong with one of the folders. What was written is kept for the next run.
        UnsupportedError: as of :func:`plan_quantize`.
    """
    merging.run(plan_quantize(model_path, output_path, scheme=scheme, ignore=ignore).folder, progress)


def _check_model(config: Any, folder: Path) -> None:
    """Refuse what is not quantised here.

    Raises:
        CheckpointError: 8-bit weights.
        UnsupportedError: a mixture of experts.
    """
    if (found := quantization_of(config)) is not None:
        raise CheckpointError(
            f"{folder} is quantised already ({found.scheme}): load it as it is, or quantise the checkpoint in "
            "floating-point numbers that it was made of"
        )
    if expert_count(config):
        raise UnsupportedError(
            f"{folder} is a mixture of experts (model_type={config.model_type!r}), and experts are not computed in 8 "
            "bits here: load it as it is"
        )


def _kept(products: Sequence[str], ignore: Sequence[str]) -> tuple[str, ...]:
    """The linear layers that ``ignore`` names.

    Raises:
        UnsupportedError: a name or pattern without any.
    """
    kept: set[str] = set()
    for name in ignore:
        found = {module for module in products if _is_named(name, module)}
        if not found and not _is_named(name, HEAD_MODULE):
            raise UnsupportedError(
                f"--ignore {name}: no linear layer of this model has that name; they are {products[0]}, …; give a "
                f"part of names (--ignore down_proj, --ignore layers.0) or a pattern (--ignore '{PATTERN}.*o_proj')"
            )
        kept |= found
    return tuple(module for module in products if module in kept)


def _is_named(name: str, module: str) -> bool:
    """By a pattern for the beginning of a module's name, or by whole dotted parts of it.

    Raises:
        UnsupportedError: no valid pattern.
    """
    if not name.startswith(PATTERN):
        return f".{name}." in f".{module}."
    try:
        return re.match(name.removeprefix(PATTERN), module) is not None
    except re.error as error:
        raise UnsupportedError(f"--ignore {name}: no regular expression ({error})") from error


def _with_field(text: str, said: dict[str, Any]) -> str:
    """config.json with ``said`` as its first field, and otherwise as it is."""
    values = json.loads(text)
    if FIELD in values:  # empty: see _check_model
        values.pop(FIELD)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    indented = json.dumps(said, indent=2).replace("\n", "\n  ")
    return with_first(f'\n  "{FIELD}": {indented},', text)


def _merged(folder: Path, name: str) -> CheckpointError:
    assumed = ("--assume-tp", "N") if merged.read_record(folder) is None else ()
    unmerge = merged.command(folder, "--unmerge", *assumed, output=f"{folder}-unmerged")
    return CheckpointError(
        f"{folder} has merged q, k and v ({name}): restore the ordinary checkpoint with `{unmerge}`, and quantise that"
    )
