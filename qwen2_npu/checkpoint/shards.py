"""Which files of a checkpoint folder hold its weights: one file, or those that an index names."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

from transformers.utils import is_peft_available

from qwen2_npu.checkpoint.configuration import read_object
from qwen2_npu.checkpoint.folders import is_file, is_folder
from qwen2_npu.compat import WEIGHTS_FIELD, named_weights
from qwen2_npu.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

ADAPTER_FILE = "adapter_config.json"

SAFETENSORS = ".safetensors"

_INDEX = re.compile(r".+?(?P<suffix>\.(safetensors|bin|pt|pth))?\.index(\.[\w-]+)?\.json")
"""Names of indexes, and what the files in them end with: model.safetensors.index.json, or with a variant
model.safetensors.index.fp16.json."""


def weights_files(
    folder: Path, weights_file: str | None = None, config: Any = None, beside_adapter: bool = False
) -> list[str]:
    """The files of weights in ``folder``, as paths in it.

    Args:
        weights_file: a file of weights in the folder, or an index of several; default: the one that ``config`` names,
            or else the usual safetensors ones.
        beside_adapter: whether the folder may hold an adapter, which the caller deals with.

    Raises:
        CheckpointError: there are none, some are missing, or they are not in the folder.
    """
    named: Any = named_weights(config)
    if weights_file is None and not beside_adapter:
        _check_adapter(folder)
    if weights_file is not None:
        name, said = weights_file, f"weights_file={weights_file!r}"
    elif named is not None:
        name, said = named, f"{WEIGHTS_FIELD}={reprlib.repr(named)} in config.json"
        if not isinstance(name, str) or not name.endswith((SAFETENSORS, f"{SAFETENSORS}.index.json")):
            raise CheckpointError(f"{folder}: {said} must be a *{SAFETENSORS} file or an index of some; correct it")
    else:
        name, said = _default_weights(folder), ""
    if _leads_outside(name):
        raise CheckpointError(f"{said} is not inside {folder}: name a file of that folder, by its path in the folder")
    if not is_file(folder / name):
        raise CheckpointError(f"{said}: {folder / name} does not exist; name a file of that folder")
    return _indexed_files(folder, name) if name.endswith(".json") else [name]


def is_safetensors(file: str) -> bool:
    """Whether a file of weights is a safetensors one by its name; all others are read as pickles."""
    return file.endswith(SAFETENSORS)


def _default_weights(folder: Path) -> str:
    for name in (SINGLE_FILE, INDEX_FILE):  # the order of transformers
        if is_file(folder / name):
            return name
    pickled = next((name for name in PICKLED if is_file(folder / name)), None)
    hint = (
        "; fetch them again"
        if pickled is None
        else f"; it has {pickled}, and pickled weights are read by name only: pass weights_file={pickled!r}, or write "
        'them as safetensors once with `python -c "from qwen2_npu import Qwen2ForCausalLM as M; '
        f'M.from_pretrained({str(folder)!r}, weights_file={pickled!r}).save_pretrained({str(folder)!r})"`'
    )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _check_adapter(folder: Path) -> None:
    """Refuse a folder in which transformers finds an adapter to the weights, and applies it.

    Raises:
        CheckpointError: with the way out.
    """
    if is_peft_available() and is_file(folder / ADAPTER_FILE):
        raise CheckpointError(
            f"{folder} has {ADAPTER_FILE}: transformers applies that adapter to the weights, and here there are none; "
            "merge it into them with peft's merge_and_unload(), or remove the file if the weights have it already"
        )


def _indexed_files(folder: Path, name: str) -> list[str]:
    """The files that an index of weights names.

    They are inside the folder (links in it may lead anywhere: the Hugging Face cache consists of them), and of the
    kind that the name of the index says: an index of safetensors files never has a pickle read.

    Raises:
        CheckpointError: it names none, others than these, or missing ones.
    """
    index = folder / name
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    match = _INDEX.fullmatch(PurePath(name).name)
    suffix = match["suffix"] if match is not None and match["suffix"] is not None else SAFETENSORS
    for file in files:
        if _leads_outside(file):
            raise CheckpointError(
                f"{index} names {file!r}, which is not inside the folder: only files of the folder are read; fetch "
                "the index again, or put the file into the folder and correct the index"
            )
        if not file.endswith(suffix):
            raise CheckpointError(
                f"{index} names {file!r}, and by its own name it is an index of *{suffix} files: no other file is read "
                "because of it; fetch it again"
            )
    paths = [str(PurePath(name).parent / file) for file in files]
    missing = [file for file in paths if not is_file(folder / file)]
    if missing:
        kind = " (a folder)" if is_folder(folder / missing[0]) else ""
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shards named by {index} are missing, first {missing[0]}{kind}; fetch the "
            "rest"
        )
    return paths


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, by an index.

    Raises:
        CheckpointError: it does not say so, or says it twice.
    """
    weight_map: Any = read_object(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not named or not all(isinstance(file, str) and file for file in named):
        raise CheckpointError(
            f"{index} is not a valid index: weight_map={reprlib.repr(weight_map)} must map tensors to files; "
            "fetch it again"
        )

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, count = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            raise CheckpointError(f"{index} is not a valid index: {reprlib.repr(name)} is in it twice; fetch it again")
        return dict(pairs)

    json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)
    return dict(weight_map)


def _leads_outside(name: str) -> bool:
    """Whether a path is not one inside the folder that it is taken in. Links are not followed."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts
