"""The one rule every NPU kernel obeys: compute on the CPU over the same memory, hand back NPU tensors.

Written and returned arguments come back as the very tensors given; views become views of the given tensor; every
other result is a new tensor on the device of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen2_npu.emulator.eager import random, tap
from qwen2_npu.emulator.eager.memory import cpu_view, to_device
from qwen2_npu.emulator.eager.plan import Plan

Tensor = torch.Tensor

MIXES_DEVICES = frozenset(
    {"copy_", "_copy_from", "_copy_from_and_resize", "_to_copy", "index", "index_put_", "_index_put_impl_", "index_put",
     "set_", "equal", "copy_memory_", "_foreach_copy_", "_unsafe_index", "_unsafe_index_put", "to"}
)  # fmt: skip
"""Operators that take CPU tensors with dimensions beside NPU ones, on hardware as here."""


def kernel_for(op: torch._ops.OpOverload, compute: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The NPU kernel of ``op``: ``compute`` (default: ``op`` itself) on CPU tensors over the arguments' memory."""
    plan = Plan.of(op)
    run = compute or op
    is_tensor, is_list = set(plan.tensors), set(plan.lists)
    keyed_tensor = {plan.names[index] for index in is_tensor}
    keyed_list = {plan.names[index] for index in is_list}
    name = op._schema.name.split("::")[1]
    mixes = name in MIXES_DEVICES
    returns = plan.returns
    single = len(returns) == 1 and not isinstance(op._schema.returns[0].type, torch.ListType)
    positions = plan.positions

    def lower(value: Any, given: dict[int, Tensor], devices: set[int], host: list[Tensor]) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_npu:  # type: ignore[attr-defined]  # put there by torch_npu
            view = cpu_view(value)
            given[id(view)] = value
            devices.add(value.get_device())
            return view
        if value.dim():
            host.append(value)
        return value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given: dict[int, Tensor] = {}
        devices: set[int] = set()
        host: list[Tensor] = []
        cpu_args = list(args)
        for index, value in enumerate(args):
            if index in is_tensor:
                cpu_args[index] = lower(value, given, devices, host)
            elif index in is_list and value is not None:
                cpu_args[index] = [lower(item, given, devices, host) for item in value]
        cpu_kwargs = dict(kwargs)
        for key, value in kwargs.items():
            if key in keyed_tensor:
                cpu_kwargs[key] = lower(value, given, devices, host)
            elif key in keyed_list and value is not None:
                cpu_kwargs[key] = [lower(item, given, devices, host) for item in value]
        if not mixes and devices and (len(devices) > 1 or host):
            raise _mixed(plan, devices, host)
        device = _device_of(devices)
        if plan.has_device:
            asked = cpu_kwargs.get("device")
            if asked is None and positions["device"] < len(args):
                asked = args[positions["device"]]
            if asked is not None:
                device = torch.device(asked)
                if positions["device"] < len(args):
                    cpu_args[positions["device"]] = torch.device("cpu")
                else:
                    cpu_kwargs["device"] = torch.device("cpu")
                if cpu_kwargs.get("pin_memory"):
                    cpu_kwargs["pin_memory"] = False
        if plan.has_generator:
            random.replace_generator(plan, cpu_args, cpu_kwargs, device)
        if tap.listeners:
            result = tap.call(plan, run, cpu_args, cpu_kwargs)
        else:
            result = run(*cpu_args, **cpu_kwargs)
        if single:
            return raise_(result, returns[0], args, kwargs, given, device)
        if not returns:
            return None
        if len(returns) == 1:
            return [raise_(item, None, args, kwargs, given, device) for item in result]
        return tuple(
            raise_(item, position, args, kwargs, given, device)
            if not isinstance(item, list | tuple)
            else [raise_(part, None, args, kwargs, given, device) for part in item]
            for item, position in zip(result, returns, strict=True)
        )

    def raise_(
        item: Any,
        position: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, Tensor],
        device: torch.device | None,
    ) -> Any:
        if not isinstance(item, Tensor):
            return item
        if position is not None:
            target = args[position] if position < len(args) else kwargs[plan.names[position]]
            if target.is_npu:
                if item.size() != target.size():  # an out= that was resized
                    _take_over(target, item)
                return target
            return item
        same = given.get(id(item))
        if same is not None:
            return same
        if plan.views:
            base = _base(item, given)
            if base is not None:
                if item.dtype == base.dtype:
                    return base.as_strided(item.size(), item.stride(), item.storage_offset())
                raise NotImplementedError(f"{plan.op}: the emulated NPU has no view of another dtype here")
        if device is None:
            device = torch.device("npu", torch.npu.current_device())  # type: ignore[attr-defined]
        return item if device.type == "cpu" else to_device(item, device)

    return kernel


def _device_of(devices: set[int]) -> torch.device | None:
    return torch.device("npu", next(iter(devices))) if devices else None


def _base(item: Tensor, given: dict[int, Tensor]) -> Tensor | None:
    pointer = item.untyped_storage().data_ptr()
    if pointer:
        for tensor in given.values():
            if tensor.untyped_storage().data_ptr() == pointer:
                return tensor
    return None


def _take_over(target: Tensor, item: Tensor) -> None:
    """An out= tensor that the operator resized: the CPU result is in other memory."""
    target.resize_(item.size())
    cpu_view(target).copy_(item)


def _mixed(plan: Plan, devices: set[int], host: list[Tensor]) -> RuntimeError:
    found = [f"npu:{index}" for index in sorted(devices)] + (["cpu"] if host else [])
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(found[:2])}! "
        f"(when calling {plan.op})"
    )
