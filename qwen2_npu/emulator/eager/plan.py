"""What an operator's schema says about its arguments, worked out once per operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WRITTEN_UNDECLARED = ("running_mean", "running_var")
"""Arguments that operators update although their schemas do not say so."""


@dataclass(frozen=True)
class Plan:
    """How the boxed rule treats one operator.

    ``tensors``, ``lists``: positions of arguments that hold a tensor, or a list of them.
    ``written``: positions of arguments the operator writes. ``returns``: per result, the position of the written
    argument it is, or None for a fresh tensor. ``views``: results may be views of an argument.
    ``resizes``: the written arguments are only written (``out=``), so the operator may resize them.
    ``device_at``, ``generator_at``: position of the argument of that name, or None.
    ``seeded``: draws random numbers without saying from which generator.
    """

    op: torch._ops.OpOverload
    names: tuple[str, ...]
    tensors: tuple[int, ...]
    lists: tuple[int, ...]
    written: tuple[int, ...]
    returns: tuple[int | None, ...]
    views: bool
    resizes: bool
    device_at: int | None
    generator_at: int | None
    seeded: bool

    @classmethod
    def of(cls, op: torch._ops.OpOverload) -> Plan:
        schema = op._schema
        arguments = schema.arguments
        names = tuple(argument.name for argument in arguments)
        kinds = [str(argument.type) for argument in arguments]
        written = []
        written_sets: dict[str, int] = {}
        reads_alias = False
        for index, argument in enumerate(arguments):
            info = argument.alias_info
            if info is None:
                continue
            if info.is_write:
                written.append(index)
                written_sets.update(dict.fromkeys(info.before_set, index))
            else:
                reads_alias = True
        generator_at = next((index for index, kind in enumerate(kinds) if "Generator" in kind), None)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        return cls(
            op=op,
            names=names,
            tensors=tuple(index for index, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")),
            lists=tuple(index for index, kind in enumerate(kinds) if "List[" in kind and "Tensor" in kind),
            written=tuple(written),
            returns=tuple(_written_argument(result, written_sets) for result in schema.returns),
            views=reads_alias or composite,
            resizes=any(arguments[index].is_out for index in written),
            device_at=names.index("device") if "device" in names else None,
            generator_at=generator_at,
            seeded=generator_at is None and torch.Tag.nondeterministic_seeded in op.tags,
        )


def _written_argument(result: torch._C.Argument, written_sets: dict[str, int]) -> int | None:
    info = result.alias_info
    if info is None or not info.is_write:
        return None
    return next((written_sets[name] for name in info.before_set if name in written_sets), None)
