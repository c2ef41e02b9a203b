"""What an operator's schema says about its arguments, worked out once per operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """How the boxed rule treats one operator.

    ``tensors``, ``lists``: names and positions of arguments that hold a tensor, or a list of them.
    ``written``: positions of arguments the operator writes. ``returns``: per result, the position of the written
    argument it is, or None for a fresh tensor. ``views``: results may be views of an argument.
    """

    op: torch._ops.OpOverload
    names: tuple[str, ...]
    positions: dict[str, int]
    tensors: tuple[int, ...]
    lists: tuple[int, ...]
    written: tuple[int, ...]
    returns: tuple[int | None, ...]
    views: bool
    has_device: bool
    has_generator: bool

    @classmethod
    def of(cls, op: torch._ops.OpOverload) -> Plan:
        schema = op._schema
        arguments = schema.arguments
        kinds = [str(argument.type) for argument in arguments]
        tensors = [index for index, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
        lists = [index for index, kind in enumerate(kinds) if "List[" in kind and "Tensor" in kind]
        alias_sets: dict[str, int] = {}
        written = []
        reads_alias = False
        for index, argument in enumerate(arguments):
            info = argument.alias_info
            if info is None:
                continue
            for name in info.before_set:
                alias_sets[name] = index
            if info.is_write:
                written.append(index)
            else:
                reads_alias = True
        returns: list[int | None] = []
        for result in schema.returns:
            info = result.alias_info
            names = list(info.before_set) if info is not None and info.is_write else []
            returns.append(alias_sets.get(names[0]) if names else None)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        return cls(
            op=op,
            names=tuple(argument.name for argument in arguments),
            positions={argument.name: index for index, argument in enumerate(arguments)},
            tensors=tuple(tensors),
            lists=tuple(lists),
            written=tuple(written),
            returns=tuple(returns),
            views=reads_alias or composite,
            has_device=any(argument.name == "device" for argument in arguments),
            has_generator=any("Generator" in kind for kind in kinds),
        )
