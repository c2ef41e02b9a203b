"""A LoRA adapter, as peft saves it, added to the weights of its base model while they are read.

q, k, v, gate and up each have their own part in an adapter, and in the stock checkpoint. It is added there, before they
are stacked: it does not matter which of them are one product in memory, or on which rank.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import is_peft_available

from qwen2_npu.checkpoint.configuration import CONFIG_FILE, one_line, read_object
from qwen2_npu.checkpoint.folders import is_file, is_folder
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.shards import ADAPTER_FILE
from qwen2_npu.checkpoint.sources import SafetensorsSource, Source, indices, whole
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Cutting, Slice

ADAPTER_WEIGHTS = "adapter_model.safetensors"

SERVED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Fields of the configuration of an adapter -> the values that are served. Other ways to begin the training change the
base model."""

READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
)
"""Fields that may have any value; every other one is refused unless it is empty: see :func:`_check_served`."""

PRODUCT = re.compile(r"base_model\.model\.(?P<module>.*)\.lora_(?P<part>[AB])\.weight")

MERGE_IT = (
    "merge it with peft (PeftModel.from_pretrained(STOCK_MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER)) "
    "and load the merged folder"
)

FLOAT_FIRST = (
    "merge the adapter into the checkpoint in floating-point numbers, quantise the merged folder with `qwen2-npu "
    "quantize`, and load that"
)
"""The way out for adapters to weights that are 8-bit integers."""


class LowRank(NamedTuple):
    """``scaling · b · a``, which is added to a weight (N, K).

    Attributes:
        a: (R, K).
        b: (N, R).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def added_to(self, weight: torch.Tensor, part: Slice | None) -> torch.Tensor:
        """The sum, at least in float32: whoever stores it rounds it once.

        Args:
            weight: that ``part`` of the whole.
        """
        a, b = self.a, self.b
        if part is not None and part.axis == 0:
            b = b[indices(part)]
        elif part is not None:
            a = a[indices(part)]
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) + (b.to(wide) @ a.to(wide)) * self.scaling


class AdaptedSource:
    """The stock tensors of ``inner`` with an adapter added: a :class:`~qwen2_npu.checkpoint.sources.Source`.

    Raises:
        CheckpointError: the adapter cannot be read, or belongs to another model.
        UnsupportedError: it is more than plain LoRA, or the weights of ``inner`` are quantised.
    """

    def __init__(self, inner: Source, adapter: Path) -> None:
        if quantization_of(inner.config) is not None:
            raise UnsupportedError(
                f"adapter={str(adapter)!r}: the weights of the model that it is for are 8-bit integers; {FLOAT_FIRST}"
            )
        self.inner, self.config = inner, inner.config
        self.where = getattr(inner, "where", type(inner).__name__)
        self._added = _read(adapter, inner)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inner.shapes()

    def stored_dtype(self) -> torch.dtype:
        return self.inner.stored_dtype()

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.inner.tensors(cut):
            added = self._added.get(name)
            yield name, tensor if added is None else added.added_to(tensor, cut(name))


def base_and_adapter(folder: Path, adapter: str | Path | bool | None) -> tuple[Path, Path | None]:
    """The folder of a base model and that of its adapter, if there is one.

    Args:
        folder: of either: with an adapter alone, its configuration names the base.
        adapter: its folder; False for none; None where nothing is said about it: then it must be clear what the
            stock class does, which ignores adapters where peft is not installed.

    Raises:
        CheckpointError: ``folder`` has both, or the adapter's base is not on this machine.
        UnsupportedError: ``adapter`` is none of these.
    """
    if adapter is False:
        return folder, None
    if isinstance(adapter, (str, Path)):
        return folder, Path(adapter).expanduser()
    if adapter is not None:
        raise UnsupportedError(f"adapter={reprlib.repr(adapter)}: pass the folder of a LoRA adapter, or False for none")
    path = folder / ADAPTER_FILE
    if not is_file(path):
        return folder, None
    if is_file(folder / CONFIG_FILE):
        if not is_peft_available():
            return folder, None
        raise CheckpointError(
            f"{folder} has {ADAPTER_FILE}: transformers applies that adapter to the weights; pass "
            f"adapter={str(folder)!r} to have it merged, or adapter=False to leave it out; or use peft's "
            "merge_and_unload(), or remove the file if the weights have it already"
        )
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not is_folder(Path(base).expanduser()):
        raise CheckpointError(
            f"{folder} holds an adapter of the model {reprlib.repr(base)}, which is no folder here (nothing is "
            f"downloaded): from_pretrained(FOLDER_OF_THAT_MODEL, adapter={str(folder)!r})"
        )
    return Path(base).expanduser(), folder


def _read(folder: Path, base: Source) -> dict[str, LowRank]:
    """Stock name of a weight -> what is added to it."""
    if not is_folder(folder) or not is_file(folder / ADAPTER_FILE):
        raise CheckpointError(
            f"adapter={str(folder)!r} is no folder of an adapter: it has no {ADAPTER_FILE}; pass the folder that "
            "peft's save_pretrained wrote"
        )
    config = read_object(folder / ADAPTER_FILE)
    _check_served(config, folder)
    if not is_file(folder / ADAPTER_WEIGHTS):
        raise CheckpointError(
            f"{folder} has no {ADAPTER_WEIGHTS} (no pickled file is read); save the adapter again with peft"
        )
    shapes = base.shapes()
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in SafetensorsSource(folder, base.config, [ADAPTER_WEIGHTS]).tensors():
        found = PRODUCT.fullmatch(name)
        module = "" if found is None else re.sub(r"^layers\.", "model.layers.", found["module"])
        if found is None or len(shapes.get(f"{module}.weight", ())) != 2:
            raise UnsupportedError(f"{folder}: {name} is no part of a LoRA product of this model; {MERGE_IT}")
        halves.setdefault(module, {})[found["part"]] = tensor
    try:
        _check_complete(config, folder, halves, shapes)
        return {
            f"{module}.weight": _low_rank(module, parts, config, folder, shapes[f"{module}.weight"])
            for module, parts in halves.items()
        }
    except (re.error, TypeError, AttributeError) as error:  # lists, patterns and objects of another kind
        raise CheckpointError(f"{folder / ADAPTER_FILE}: {one_line(error)}; save the adapter again") from error


def _check_served(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter that is more than plain LoRA: by what it says, and by every field that is not known here."""
    for name, value in config.items():
        if name in READ or name in SELECTING or name in WITHOUT_EFFECT:
            continue
        if value not in SERVED[name] if name in SERVED else value not in (None, False, "", [], {}):
            raise UnsupportedError(
                f"{folder / ADAPTER_FILE}: {name}={reprlib.repr(value)} is not served, only plain LoRA is; {MERGE_IT}"
            )


def _check_complete(
    config: Mapping[str, Any], folder: Path, halves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse an adapter with other tensors than its configuration says: part of a download, or of another model."""
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    targeted = [module for module in modules if _targeted(config, module)]
    missing = [module for module in targeted if sorted(halves.get(module, {})) != ["A", "B"]]
    extra = [module for module in halves if module not in targeted]
    if missing or extra or not halves:
        first = f", first of {(missing + extra)[0]}" if missing or extra else ""
        raise CheckpointError(
            f"{folder} does not fit its {ADAPTER_FILE} and this model: lora_A or lora_B is missing of {len(missing)} "
            f"of {len(targeted)} products, and {len(extra)} more are there{first}; fetch it again, or pass its own base"
        )


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether peft puts an adapter there."""
    targets: Any = config.get("target_modules")
    excluded: Any = config.get("exclude_modules")
    if excluded and _named(excluded, module):
        return False
    if targets == "all-linear":
        return not module.endswith(("lm_head", "embed_tokens"))
    layers = config.get("layers_to_transform")
    if not isinstance(targets, str) and module not in targets and layers not in (None, []):
        patterns = config.get("layers_pattern") or r"[^.]*"
        found = next(
            filter(None, (re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module) for pattern in _listed(patterns))), None
        )
        if found is None or int(found[1]) not in _listed(layers):
            return False
    return _named(targets, module)


def _named(names: Any, module: str) -> bool:
    """By a pattern for the whole name, or a list of the ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _low_rank(
    module: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path, shape: tuple[int, ...]
) -> LowRank:
    """The two parts, after comparing their shapes with the weight's and the rank with the configuration's."""
    rank = _of_module(config, "r", "rank_pattern", module)
    alpha = _of_module(config, "lora_alpha", "alpha_pattern", module)
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{folder / ADAPTER_FILE}: r={rank!r} and lora_alpha={alpha!r} for {module}; r must be a positive "
            "integer and lora_alpha a number: save the adapter again"
        )
    a, b = parts["A"], parts["B"]
    if a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        raise CheckpointError(
            f"{folder}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, expected {(rank, shape[1])} "
            f"and {(shape[0], rank)} for r={rank}; pass the model that the adapter was trained on"
        )
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_module(config: Mapping[str, Any], field: str, patterns: str, module: str) -> Any:
    """A number of one module, or else that of all."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(field)
