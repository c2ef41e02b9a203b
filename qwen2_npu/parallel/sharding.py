"""Which part of every parameter a rank of a tensor-parallel model holds. The table :data:`CUTS` says all of it.

A product whose output is cut (q, k, v, gate, up) needs nothing from other ranks. One whose input is cut (o, down) gives
every rank a part of the sum, and one all-reduce adds the parts up: two per layer. The scheme is that of Megatron-LM
(Shoeybi et al., 2019, arXiv:1909.08053, section 3).

Biases stand only on products whose output is cut, so each is added once. (o_proj and down_proj of Qwen2 have none.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qwen2_npu.compat import expert_count, head_dim, kv_head_count
from qwen2_npu.errors import UnsupportedError

Unit = Literal["query heads", "kv heads", "columns", "expert columns", "shared columns", "vocabulary"]
"""What is never torn apart: a head, a column of an MLP (of every expert, of the shared expert), a token."""


class Cut(NamedTuple):
    """``axis`` of a stock tensor is cut, in whole ``unit``s."""

    axis: int
    unit: Unit


CUTS: dict[str, Cut] = {
    "q_proj.weight": Cut(0, "query heads"),
    "q_proj.bias": Cut(0, "query heads"),
    "k_proj.weight": Cut(0, "kv heads"),
    "k_proj.bias": Cut(0, "kv heads"),
    "v_proj.weight": Cut(0, "kv heads"),
    "v_proj.bias": Cut(0, "kv heads"),
    "o_proj.weight": Cut(1, "query heads"),
    "gate_proj.weight": Cut(0, "columns"),
    "up_proj.weight": Cut(0, "columns"),
    "down_proj.weight": Cut(1, "columns"),
    "expert gate_proj.weight": Cut(0, "expert columns"),
    "expert up_proj.weight": Cut(0, "expert columns"),
    "expert down_proj.weight": Cut(1, "expert columns"),
    "shared_expert gate_proj.weight": Cut(0, "shared columns"),
    "shared_expert up_proj.weight": Cut(0, "shared columns"),
    "shared_expert down_proj.weight": Cut(1, "shared columns"),
    "embed_tokens.weight": Cut(0, "vocabulary"),
    "lm_head.weight": Cut(0, "vocabulary"),
}
"""End of a stock tensor's name (:func:`ending`) -> how it is cut. Every rank holds what is not here whole: the norms,
and the gates of a mixture of experts, whose choice all ranks make alike."""


OF_SCALE = "_scale"
"""What the name of the scales of 8-bit weights adds to that of the weights."""


def ending(name: str) -> str:
    """The end of a stock tensor's name that tells its kind: module and parameter, and whether an expert's."""
    parts = name.split(".")
    kind = "expert " if "experts" in parts else "shared_expert " if "shared_expert" in parts else ""
    return kind + ".".join(parts[-2:])


LARGEST = 8
"""Ranks of a model at most: the cards of one server, which are all connected to each other (HCCS)."""


class Slice(NamedTuple):
    """``[start, stop)`` along ``axis`` of a stock tensor."""

    axis: int
    start: int
    stop: int


Cutting = Callable[[str], Slice | None]
"""Name of a stock tensor -> the part of it that is wanted; None for all of it."""


@dataclass(frozen=True)
class Shard:
    """The part of a model that one of ``size`` ranks holds.

    Raises:
        UnsupportedError: ``size`` or ``rank`` is not a number of ranks, or of one of them.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise UnsupportedError(f"tp_size={self.size!r} must be a positive integer: the number of ranks")
        if type(self.rank) is not int or not 0 <= self.rank < self.size:
            raise UnsupportedError(f"tp_rank={self.rank!r} must be an integer from 0 to {self.size - 1}")

    def check(self, config: Any) -> None:
        """Refuse a number of ranks that the heads or the MLP of ``config`` cannot be cut into.

        Raises:
            UnsupportedError: naming the head counts, and the numbers of ranks that are possible.
        """
        if (fault := _fault(config, self.size)) is not None:
            possible = ", ".join(map(str, admissible_sizes(config)))
            raise UnsupportedError(f"tp_size={self.size}: {fault}; this model can be cut for {possible}")

    def part(self, unit: Unit, config: Any) -> range:
        """The heads, columns or tokens of ``config`` that this rank holds.

        Fewer kv heads than ranks are replicated: the ranks whose query heads share one all hold it. A vocabulary that
        the ranks do not divide is held whole.
        """
        count = _count(unit, config)
        if unit == "kv heads" and count < self.size:
            head = self.rank * count // self.size
            return range(head, head + 1)
        if unit == "vocabulary" and count % self.size:
            return range(count)
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def count(self, unit: Unit, config: Any) -> int:
        """How many of them."""
        return len(self.part(unit, config))

    def slice_of(self, name: str, config: Any) -> Slice | None:
        """The part of the stock tensor ``name`` that this rank holds; None for all of it.

        The scales of 8-bit weights, one per row, are cut with the rows.
        """
        cut = CUTS.get(ending(name.removesuffix(OF_SCALE)))
        if cut is None or self.size == 1 or (name.endswith(OF_SCALE) and cut.axis != 0):
            return None
        part = self.part(cut.unit, config)
        if len(part) == _count(cut.unit, config):
            return None
        width = head_dim(config) if cut.unit in ("query heads", "kv heads") else 1
        return Slice(cut.axis, part.start * width, part.stop * width)

    def shape_of(self, name: str, shape: tuple[int, ...], config: Any) -> tuple[int, ...]:
        """The shape of that part, of a tensor of ``shape``."""
        found = self.slice_of(name, config)
        if found is None:
            return shape
        return (*shape[: found.axis], found.stop - found.start, *shape[found.axis + 1 :])


WHOLE = Shard()
"""The model on one card."""


def admissible_sizes(config: Any) -> tuple[int, ...]:
    """The numbers of ranks that ``config`` can be cut for."""
    return tuple(size for size in range(1, LARGEST + 1) if _fault(config, size) is None)


def _fault(config: Any, size: int) -> str | None:
    """Why ``size`` ranks are not possible."""
    heads, kv_heads = (_count(unit, config) for unit in ("query heads", "kv heads"))
    said = f"{heads} query heads and {kv_heads} kv heads"
    if size > LARGEST:
        return f"a model goes to at most {LARGEST} cards ({said})"
    if heads % size:
        return f"{said}: {size} ranks do not divide {heads}"
    if kv_heads % size and size % kv_heads:
        return f"{said}: neither do {size} ranks divide {kv_heads}, nor can each kv head go to the same number of ranks"
    for unit, field in COLUMNS.items():
        if _count(unit, config) % size:
            return f"{said}, and {field}={_count(unit, config)}, which {size} ranks do not divide"
    return None


COLUMNS: dict[Unit, str] = {
    "columns": "intermediate_size",
    "expert columns": "moe_intermediate_size",
    "shared columns": "shared_expert_intermediate_size",
}
"""Unit -> the field of the configuration that counts it."""


def _count(unit: Unit, config: Any) -> int:
    """How many there are; none of the experts in a dense model."""
    if unit in COLUMNS:
        return int(getattr(config, COLUMNS[unit])) if unit == "columns" or expert_count(config) else 0
    if unit == "kv heads":
        return kv_head_count(config)
    return int(config.num_attention_heads if unit == "query heads" else config.vocab_size)
