"""The one rule every NPU kernel obeys: compute on the CPU over the same memory, hand back NPU tensors.

Written and returned arguments come back as the very tensors given; views become views of the given tensor; every
other result is a new tensor on the card of the arguments. Nothing handed back is a CPU tensor over device memory.
"""

from __future__ import annotations

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

_modes_enabled = torch._C._is_torch_function_mode_enabled
_any_autocast_enabled = torch._C._is_any_autocast_enabled
_autocast_enabled = torch._C.is_autocast_enabled


def kernel_for(op: torch._ops.OpOverload, compute: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The NPU kernel of ``op``: ``compute`` (default: ``op`` itself) on CPU tensors over the arguments' memory.

    A ``compute`` with the attribute ``draws`` gets the keyword ``generator``: a function that gives a CPU one.
    """
    plan = Plan.of(op)
    run = op if compute is None else compute
    name = op._schema.name.split("::")[1]
    names, tensors, lists, written, returns = plan.names, plan.tensors, plan.lists, plan.written, plan.returns
    keyed = {names[index] for index in (*tensors, *lists)}
    single = len(returns) == 1 and not isinstance(op._schema.returns[0].type, torch.ListType)
    first = returns[0] if returns else None
    mixes, host_results = name in MIXES_DEVICES, HOST_RESULTS.get(name, ())
    device_at, generator_at, resizes = plan.device_at, plan.generator_at, plan.resizes
    draws = generator_at is None and getattr(compute, "draws", False)
    seeded = plan.seeded and compute is None
    prepares = device_at is not None or generator_at is not None or draws or seeded

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _modes_enabled() or (_any_autocast_enabled() and _autocast_enabled("cpu")):
            # Neither the caller's function modes nor CPU autocast may change what is computed here.
            with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
                return apply(args, kwargs)
        return apply(args, kwargs)

    def apply(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        views: Views = []
        storages: memory.Storages = {}
        host = mixed = False
        card = UNKNOWN
        cpu_args = list(args)
        count = len(cpu_args)
        for index in tensors:
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
                    mixed = True
            elif value.dim():
                host = True
        for index in lists:
            if index < count:
                cpu_args[index] = _lower(args[index], views, storages)
        cpu_kwargs = kwargs
        if kwargs:
            cpu_kwargs = {
                key: _lower(value, views, storages) if key in keyed else value for key, value in kwargs.items()
            }
        if lists or kwargs:
            host = host or _on_host(plan, args, kwargs)
            cards = {owner.get_device() for _, owner in views}
            mixed = len(cards) > 1
            card = views[0][1].get_device() if views else UNKNOWN
        if (mixed or host) and views and not mixes:
            raise _mixed(plan, views, host)
        if prepares:
            card = prepare(cpu_args, cpu_kwargs, card)
        try:
            if tap.listeners:
                if card == HOST and views:
                    for tell in tap.leaving:
                        tell(plan)
                result = tap.call(plan, run, cpu_args, cpu_kwargs)
            elif seeded:
                with random.as_default(random.draw(random.default_generator(card))):
                    result = run(*cpu_args, **cpu_kwargs)
            else:
                result = run(*cpu_args, **cpu_kwargs)
        except RuntimeError as error:
            if not resizes or "not resizable" not in str(error):
                raise
            for index in written:
                _put(index, cpu_args, cpu_kwargs, names[index], _blank_like(_get(index, args, kwargs, names[index])))
            result = run(*cpu_args, **cpu_kwargs)
        for index in written:
            key = names[index]
            _settle(_get(index, args, kwargs, key), _get(index, cpu_args, cpu_kwargs, key))
        if single:
            if first is None:
                return _hand_out(result, views, card, plan)
            return args[first] if first < count else kwargs[names[first]]
        if not returns:
            return None
        if len(returns) == 1:
            return [_hand_out(item, views, card, plan) for item in result]
        return tuple(
            _hand_out(item, views, HOST if index in host_results else card, plan)
            if position is None
            else _get(position, args, kwargs, names[position])
            for index, (item, position) in enumerate(zip(result, returns, strict=True))
        )

    def prepare(cpu_args: list[Any], cpu_kwargs: dict[str, Any], card: int) -> int:
        """Put CPU devices and generators where NPU ones are asked for; returns where results belong."""
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
            random.replace_generator(generator_at, names[generator_at], cpu_args, cpu_kwargs, card)
        elif draws:
            index = card
            cpu_kwargs["generator"] = lambda: random.draw(random.default_generator(index))
        return card

    return kernel


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


def _mixed(plan: Plan, views: Views, host: bool) -> RuntimeError:
    found = [f"npu:{index}" for index in sorted({owner.get_device() for _, owner in views})] + ["cpu"] * host
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(found[:2])}! "
        f"(when calling {plan.op})"
    )
