"""Wrong uses of an operator's arguments, for the question whether a set of samples would see them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from qwen2_npu.conformance.operators.check import find_problems, operator_of
from qwen2_npu.conformance.operators.record import OperatorRecord, Sample

Change = Callable[[dict[str, Any]], dict[str, Any]]


def faults(record: OperatorRecord, sample: Sample) -> Iterator[tuple[str, Change]]:
    """An argument that is not at its default and is ignored; two arguments of one type that change places."""
    given = record.arguments(sample.parameters, record.dtypes_on("emulated")[0], sample.seed)
    arguments = [a for a in getattr(torch.ops.npu, record.name).default._schema.arguments if a.name in given]
    for argument in arguments:
        if argument.has_default_value() and not np.array_equal(given[argument.name], argument.default_value):
            yield f"{argument.name} ignored", lambda values, name=argument.name: without(values, name)
    for one, other in itertools.combinations(arguments, 2):
        if str(one.type) == str(other.type) and not np.array_equal(given[one.name], given[other.name]):
            yield (
                f"{one.name} and {other.name} exchanged",
                lambda values, a=one.name, b=other.name: {**values, a: values[b], b: values[a]},
            )


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def possible(record: OperatorRecord) -> dict[str, list[str]]:
    """Every fault that some sample of the catalogue has the arguments for, and those samples."""
    found: dict[str, list[str]] = {}
    for sample in record.samples:
        for name, _ in faults(record, sample):
            found.setdefault(name, []).append(sample.name)
    return found


def seen(record: OperatorRecord, samples: Iterable[Sample]) -> set[str]:
    """The faults that lead to a wrong result of, or an error in, one of ``samples``."""
    operator, dtype = operator_of(record.name), record.dtypes_on("emulated")[0]
    found: set[str] = set()
    for sample in samples:
        for name, change in faults(record, sample):
            if name in found:
                continue

            def faulty(change: Change = change, **arguments: Any) -> Any:
                return operator(**change(arguments))

            try:
                problems = find_problems(record, sample.parameters, dtype, "cpu", sample.seed, implementation=faulty)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                found.add(name)
            else:
                found |= {name} if problems else set()
    return found


def constant(record: OperatorRecord, samples: Iterable[Sample]) -> set[str]:
    """Numbers, flags and words that are the same in all ``samples``, though not in all of the catalogue's."""

    def values(some: Iterable[Sample]) -> dict[str, set[Any]]:
        found: dict[str, set[Any]] = {}
        schema = getattr(torch.ops.npu, record.name).default._schema
        for sample in some:
            given = record.arguments(sample.parameters, record.dtypes_on("emulated")[0], sample.seed)
            for argument in schema.arguments:
                value = given.get(argument.name, argument.default_value)
                if isinstance(value, bool | int | float | str):
                    found.setdefault(argument.name, set()).add(value)
        return found

    chosen = values(samples)
    return {name for name, every in values(record.samples).items() if len(every) > 1 and len(chosen[name]) == 1}
