"""Tensors under the names of the stock model, and whether its head is tied: as transformers' ``from_pretrained`` does.

A folder may hold a base model (``layers.0…`` in place of ``model.layers.0…``), only one tensor of two that are tied, or
two different ones that config.json calls tied. What the installed transformers makes of these is what is loaded here.
The versions differ in two things:

- 5.x looks at each name for itself, and drops a ``model.`` too many (``model.model.layers.0…``). 4.37 adds ``model.``
  to all names or to none, and refuses names without it beside an lm_head.
- Of a tied model with an lm_head that differs from the embedding, 5.x takes both tensors, and does not tie them. 4.37
  puts whichever it reads last in the place of both, so that the embedding is lost, or the head. No such model was
  meant: it is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from qwen2_npu.checkpoint.merged import Tensors
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import CheckpointError
from qwen2_npu.parallel.sharding import Cutting, Slice

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_PREFIX = "model."
_OF_BASE = re.compile(r"(embed_tokens|layers|norm)\..*")
"""Names in a base model."""

_PREFIX_TOO_MANY = re.compile(rf"model\.(model\.{_OF_BASE.pattern}|lm_head\..*)")


def as_stock(source: Tensors) -> Any:
    """``source`` with the names of the stock model and, where its head is not tied after all, a configuration that
    says so. Weights are read only where both tensors of a tied pair are there, to compare them.

    Raises:
        CheckpointError: two tensors are the same one of the model; or the installed transformers refuses it.
    """
    names = stock_names(list(source.shapes()), where=source.where, tied=source.config.tie_word_embeddings)
    if any(stored != name for stored, name in names.items()):
        source = Renamed(source, names)
    if source.config.tie_word_embeddings and _has_head_of_its_own(source):
        if IS_V4:
            raise CheckpointError(
                f"{source.where} does not fit its configuration: {HEAD} differs from {EMBEDDING}, and "
                f"tie_word_embeddings is true: transformers {transformers.__version__} would put one in the place of "
                "the other; set tie_word_embeddings to false in config.json to use both"
            )
        source.config = copy.deepcopy(source.config)
        source.config.tie_word_embeddings = False
    return source


def stock_names(stored: Sequence[str], *, where: str, tied: bool) -> dict[str, str]:
    """Stored name -> name in the stock model. Names that transformers does not know stay as they are.

    Raises:
        CheckpointError: see :func:`as_stock`.
    """
    rename = (_names_of_v4 if IS_V4 else _names_of_v5)(stored, where)
    if tied and EMBEDDING not in rename.values():
        rename = {name: EMBEDDING if renamed == HEAD else renamed for name, renamed in rename.items()}
    first: dict[str, str] = {}
    for name, renamed in rename.items():
        if (other := first.setdefault(renamed, name)) != name:
            raise CheckpointError(
                f"{where}: {other} and {name} are both the model's {renamed}; remove one of them, or fetch the "
                "checkpoint again"
            )
    return rename


def _names_of_v5(stored: Sequence[str], where: str) -> dict[str, str]:
    def renamed(name: str) -> str:
        if _OF_BASE.fullmatch(name):
            return _PREFIX + name
        return name.removeprefix(_PREFIX) if _PREFIX_TOO_MANY.fullmatch(name) else name

    return {name: renamed(name) for name in stored}


def _names_of_v4(stored: Sequence[str], where: str) -> dict[str, str]:
    base = next(filter(_OF_BASE.fullmatch, stored), None)
    if base is None or any(name.startswith("model") for name in stored):
        return {name: name for name in stored}
    if HEAD in stored:
        raise CheckpointError(
            f"{where}: {base} has no {_PREFIX!r} before it, as in a base model, and there is {HEAD}, which no base "
            f"model has: transformers {transformers.__version__} refuses that; install 'transformers>=5,<6', or rename "
            "the tensors"
        )
    return {name: _PREFIX + name if _OF_BASE.fullmatch(name) else name for name in stored}


def _has_head_of_its_own(source: Tensors) -> bool:
    shapes = source.shapes()
    if HEAD not in shapes:  # a head alone is called the embedding
        return False
    if shapes[EMBEDDING] != shapes[HEAD]:
        return True
    found = source.read([EMBEDDING, HEAD])
    embedding, head = found[EMBEDDING], found[HEAD]
    if embedding.data_ptr() == head.data_ptr():
        return False
    wide = torch.promote_types(embedding.dtype, head.dtype)
    return not torch.equal(embedding.to(wide), head.to(wide))


class Renamed:
    """A source with other names: a :class:`~qwen2_npu.checkpoint.sources.NamedSource`, and a
    :class:`~qwen2_npu.checkpoint.merged.Tensors`.

    Args:
        inner: the tensors as they are stored.
        names: the name of each here; no two have the same.
    """

    def __init__(self, inner: Tensors, names: Mapping[str, str]) -> None:
        self.inner, self.names = inner, names
        self.config, self.where = inner.config, inner.where

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.names[name]: shape for name, shape in self.inner.shapes().items()}

    def stored_dtype(self) -> torch.dtype:
        return self.inner.stored_dtype()

    def dtypes(self) -> dict[str, torch.dtype]:
        return {self.names[name]: dtype for name, dtype in self.inner.dtypes().items()}

    def tensors(self, cut: Cutting = lambda name: None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, or the part of it that ``cut`` says, one at a time."""
        for name, pieces in self.pieces(lambda name: (cut(name),)):
            yield name, pieces.pop()

    def pieces(self, cuts: Callable[[str], Sequence[Slice | None]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Every tensor with the pieces of it that ``cuts`` names."""
        for name, pieces in self.inner.pieces(lambda name: cuts(self.names[name])):
            yield self.names[name], pieces

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, as often as they are asked for."""
        wanted = {stored: name for stored, name in self.names.items() if name in names}
        return {wanted[stored]: tensor for stored, tensor in self.inner.read(list(wanted)).items()}
