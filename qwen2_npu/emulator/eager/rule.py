"""The rule of every NPU kernel: compute on the CPU over the same memory, return NPU tensors.

Written and returned arguments come back as the very tensors given; views become views of the given tensor; every
other result is a new tensor on the card of the arguments. Nothing handed back is a CPU tensor over device memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.emulator.eager import memory, random, tap
from qwen2_npu.emulator.eager.memory import cpu_view
from qwen2_npu.emulator.eager.plan import Plan

Tensor = torch.Tensor
Views = list[tuple[Tensor, Tensor]]
"""(CPU view, npu tensor) of every npu argument of one call."""

_MIXES_DEVICES = """
    copy_ _copy_from _copy_from_and_resize _to_copy index _unsafe_index index_put index_put_ _index_put_impl_
    _unsafe_index_put set_ equal copy_memory_ _foreach_copy_ to _pack_padded_sequence
"""
MIXES_DEVICES = frozenset(_MIXES_DEVICES.split())
"""Operators that take CPU tensors with dimensions beside NPU ones, on hardware as here."""

HOST_RESULTS = {"_pack_padded_sequence": (1,)}
"""Operator -> which of its results are on the CPU on every device."""

UNKNOWN, HOST = -1, -2
"""In place of a card's number: no argument says which; the result belongs on the CPU."""

_LACKING = re.compile(r"(?:not implemented for '|Low precision dtypes not supported. Got )(\w+)")
"""How PyTorch says that a kernel does not take a dtype."""

_modes_enabled = torch._C._is_torch_function_mode_enabled
_any_autocast_enabled = torch._C._is_any_autocast_enabled
_autocast_enabled = torch._C.is_autocast_enabled


def kernel_for(op: torch._ops.OpOverload, compute: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The NPU kernel of ``op``: ``compute`` (default: ``op`` itself) on CPU tensors over the arguments' memory.

    A ``compute`` with the attribute ``draws`` gets the keyword ``generator``: a function that gives a CPU one.
    """
    apply = _Rule(Plan.of(op), compute).apply

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _modes_enabled() or (_any_autocast_enabled() and _autocast_enabled("cpu")):
            # Neither the caller's function modes nor CPU autocast may change what is computed here.
            with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
                return apply(args, kwargs)
        return apply(args, kwargs)

    return kernel


class _Rule:
    """The rule for one operator; ``apply`` is one call. What does not change between calls is worked out once.

    Attributes:
        run: what computes the operator on CPU tensors.
        keyed: names of the arguments that hold tensors.
        single: there is one result, which is not a list.
        first: the position of the argument that result is, None if it is new.
        mixes: takes CPU tensors beside NPU ones.
        host_results: which results are on the CPU on every device.
        draws: ``run`` takes ``generator``. ``seeded``: it draws from the CPU's default generator.
        prepares: the device or a generator must be replaced in the arguments.
    """

    __slots__ = (
        *("draws", "first", "host_results", "keyed", "lists", "mixes", "names", "plan", "prepares", "resizes"),
        *("returns", "run", "seeded", "single", "tensors", "written"),
    )

    def __init__(self, plan: Plan, compute: Callable[..., Any] | None) -> None:
        schema = plan.op._schema
        name = schema.name.split("::")[1]
        self.plan = plan
        self.run = plan.op if compute is None else compute
        self.names, self.tensors, self.lists = plan.names, plan.tensors, plan.lists
        self.written, self.returns, self.resizes = plan.written, plan.returns, plan.resizes
        self.keyed = {plan.names[index] for index in (*plan.tensors, *plan.lists)}
        self.single = len(plan.returns) == 1 and not isinstance(schema.returns[0].type, torch.ListType)
        self.first = plan.returns[0] if plan.returns else None
        self.mixes, self.host_results = name in MIXES_DEVICES, HOST_RESULTS.get(name, ())
        self.draws = plan.generator_at is None and getattr(compute, "draws", False)
        self.seeded = plan.seeded and compute is None
        self.prepares = self.draws or self.seeded or plan.device_at is not None or plan.generator_at is not None

    def apply(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one call."""
        cpu_args, cpu_kwargs, views, card = self.lower(args, kwargs)
        if self.prepares:
            card = self.prepare(cpu_args, cpu_kwargs, card)
        try:
            if tap.listeners or self.seeded:
                result = self.run_watched_or_seeded(cpu_args, cpu_kwargs, views, card)
            else:
                result = self.run(*cpu_args, **cpu_kwargs)
        except RuntimeError as error:
            lacking = _LACKING.search(str(error))
            if lacking:
                raise _without_cpu_kernel(self.plan, lacking[1], error) from None
            if not self.resizes or "not resizable" not in str(error):
                raise
            result = self.run_resizing(args, kwargs, cpu_args, cpu_kwargs)
        for index in self.written:
            key = self.names[index]
            _settle(_get(index, args, kwargs, key), _get(index, cpu_args, cpu_kwargs, key))
        if self.single:
            first = self.first
            if first is None:
                return _hand_out(result, views, card, self.plan)
            return args[first] if first < len(args) else kwargs[self.names[first]]
        return self.hand_back(result, args, kwargs, views, card)

    def lower(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Views, int]:
        """The arguments with CPU views in place of NPU tensors, those views, and the card of the first tensor.

        Raises:
            RuntimeError: the tensors are on several devices.
        """
        views: Views = []
        storages: memory.Storages = {}
        several = False
        card = UNKNOWN
        cpu_args, cpu_kwargs = list(args), kwargs
        count = len(cpu_args)
        for index in self.tensors:
            if index >= count:
                break
            value = args[index]
            if not isinstance(value, Tensor):  # None, or a number: x + 1 gives the operator a 1
                continue
            where = value.get_device()
            if where >= 0:
                view = cpu_args[index] = cpu_view(value, storages)
                views.append((view, value))
                if card == UNKNOWN:
                    card = where
                elif where != card:
                    several = True
            elif value.dim():
                several = True
        if self.lists or kwargs:
            cpu_kwargs = self.lower_lists_and_names(args, kwargs, cpu_args, views, storages)
            cards = {owner.get_device() for _, owner in views}
            several = several or len(cards) > 1 or _on_host(self.plan, args, kwargs)
            card = views[0][1].get_device() if views else UNKNOWN
        if several and views and not self.mixes:
            raise _mixed(self.plan, views, _on_host(self.plan, args, kwargs))
        return cpu_args, cpu_kwargs, views, card

    def lower_lists_and_names(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cpu_args: list[Any],
        views: Views,
        storages: memory.Storages,
    ) -> dict[str, Any]:
        """Replace the tensors in lists in ``cpu_args``; the arguments by name, with theirs replaced."""
        for index in self.lists:
            if index < len(args):
                cpu_args[index] = _lower(args[index], views, storages)
        if not kwargs:
            return kwargs
        keyed = self.keyed
        return {key: _lower(value, views, storages) if key in keyed else value for key, value in kwargs.items()}

    def prepare(self, cpu_args: list[Any], cpu_kwargs: dict[str, Any], card: int) -> int:
        """Put CPU devices and generators where NPU ones are asked for; returns where results belong."""
        device_at, generator_at = self.plan.device_at, self.plan.generator_at
        if device_at is not None:
            asked = _get(device_at, cpu_args, cpu_kwargs, "device")
            if asked is not None:
                device = torch.device(asked)
                _put(device_at, cpu_args, cpu_kwargs, "device", memory.CPU)
                cpu_kwargs.pop("pin_memory", None)
                card = HOST if device.type == "cpu" else UNKNOWN if device.index is None else device.index
        if card == UNKNOWN:
            card = _current_card()
        if generator_at is not None:
            random.replace_generator(generator_at, self.names[generator_at], cpu_args, cpu_kwargs, card)
        elif self.draws:
            index = card
            cpu_kwargs["generator"] = lambda: random.draw(random.default_generator(index))
        return card

    def run_watched_or_seeded(self, cpu_args: list[Any], cpu_kwargs: dict[str, Any], views: Views, card: int) -> Any:
        """``run`` through the listeners, if there are any; else with the card's generator as the default one."""
        if tap.listeners:
            if card == HOST and views:
                for tell in tap.leaving:
                    tell(self.plan)
            return tap.call(self.plan, self.run, cpu_args, cpu_kwargs)
        with random.as_default(random.draw(random.default_generator(card))):
            return self.run(*cpu_args, **cpu_kwargs)

    def run_resizing(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cpu_args: list[Any], cpu_kwargs: dict[str, Any]
    ) -> Any:
        """``run`` with tensors of any size in place of the arguments it writes."""
        for index in self.written:
            key = self.names[index]
            _put(index, cpu_args, cpu_kwargs, key, _blank_like(_get(index, args, kwargs, key)))
        return self.run(*cpu_args, **cpu_kwargs)

    def hand_back(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], views: Views, card: int) -> Any:
        """No result, a list of them, or several, as the caller gets them."""
        if not self.returns:
            return None
        if len(self.returns) == 1:
            return [_hand_out(item, views, card, self.plan) for item in result]
        return tuple(
            _hand_out(item, views, HOST if index in self.host_results else card, self.plan)
            if position is None
            else _get(position, args, kwargs, self.names[position])
            for index, (item, position) in enumerate(zip(result, self.returns, strict=True))
        )


def _lower(value: Any, views: Views, storages: memory.Storages) -> Any:
    """An argument, or a list of them, with CPU views in place of npu tensors."""
    if isinstance(value, Tensor):
        if value.get_device() < 0:
            return value
        view = cpu_view(value, storages)
        views.append((view, value))
        return view
    return [_lower(item, views, storages) for item in value] if isinstance(value, list | tuple) else value


def _get(index: int, args: Any, kwargs: dict[str, Any], key: str) -> Any:
    return args[index] if index < len(args) else kwargs.get(key)


def _put(index: int, args: list[Any], kwargs: dict[str, Any], key: str, value: Any) -> None:
    if index < len(args):
        args[index] = value
    else:
        kwargs[key] = value


def _settle(target: Any, view: Any) -> None:
    """Let a written npu tensor take the shape that the operator gave its CPU view."""
    if isinstance(target, list | tuple):
        for one, its_view in zip(target, view, strict=True):
            _settle(one, its_view)
    elif isinstance(target, Tensor) and target.get_device() >= 0:
        same_shape = view.size() == target.size() and view.stride() == target.stride()
        if view.data_ptr() == target.data_ptr() and view.numel():
            if not same_shape:
                target.as_strided_(view.size(), view.stride(), view.storage_offset())
        elif view.numel() or not same_shape:
            memory.replace(target, view)


def _blank_like(target: Any) -> Any:
    """Something an operator can write any shape to."""
    if isinstance(target, list | tuple):
        return [_blank_like(item) for item in target]
    return torch.empty(0, dtype=target.dtype, device=memory.CPU)


def _hand_out(item: Any, views: Views, card: int, plan: Plan) -> Any:
    """A result as the caller gets it."""
    if not isinstance(item, Tensor):
        return [_hand_out(part, views, card, plan) for part in item] if isinstance(item, list | tuple) else item
    for view, owner in views:
        if item is view:
            return owner
    if plan.views or card == HOST:
        base = _base(item, views)
        if base is not None:
            return item.clone() if card == HOST else _view_of(base, item)
    if card == HOST or item.get_device() >= 0:
        return item
    if item.layout is not torch.strided:
        raise NotImplementedError(f"{plan.op} gives a tensor of layout {item.layout}, which the emulated NPU lacks")
    out = memory.to_device(item, _current_card() if card == UNKNOWN else card)
    for tell in tap.stored:
        tell(item, out)
    return out


def _base(item: Tensor, views: Views) -> Tensor | None:
    """The argument in whose memory a result is."""
    pointer = item.untyped_storage().data_ptr()
    if pointer:
        for view, owner in views:
            if view.untyped_storage().data_ptr() == pointer:
                return owner
    return None


def _view_of(base: Tensor, item: Tensor) -> Tensor:
    """The view of ``base`` that the CPU tensor ``item`` is of its memory."""
    if item.dtype == base.dtype:
        view = base.as_strided(item.size(), item.stride(), item.storage_offset())
    else:
        view = torch.empty(0, dtype=item.dtype, device=base.device)
        view.set_(base.untyped_storage(), item.storage_offset(), item.size(), item.stride())
    if item.is_neg() != base.is_neg():
        view = torch._neg_view(view)
    if item.is_complex() and base.is_complex() and item.is_conj() != base.is_conj():
        view = torch._conj(view)
    return view


def _current_card() -> int:
    return int(torch.npu.current_device())  # type: ignore[attr-defined]  # put there by torch_npu


def _on_host(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an argument given in a list or by name is a CPU tensor with dimensions."""
    for index in (*plan.tensors, *plan.lists):
        value = _get(index, args, kwargs, plan.names[index])
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Tensor) and item.get_device() < 0 and item.dim():
                return True
    return False


def _without_cpu_kernel(plan: Plan, dtype: str, error: RuntimeError) -> NotImplementedError:
    return NotImplementedError(
        f"{plan.op} is not supported on the emulated NPU for {dtype}: PyTorch has no CPU kernel for it ({error}). "
        "Convert its arguments, to float32 for example; where hardware takes the dtype, add the operator to "
        "qwen2_npu/emulator/eager/operators/halves.py"
    )


def _mixed(plan: Plan, views: Views, host: bool) -> RuntimeError:
    found = [f"npu:{index}" for index in sorted({owner.get_device() for _, owner in views})] + ["cpu"] * host
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(found[:2])}! "
        f"(when calling {plan.op})"
    )
